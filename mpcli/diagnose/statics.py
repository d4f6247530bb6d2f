"""What number formats can hold of given values: exact counts, and a verdict by layer.

Nothing here is sampled, and nothing depends on how a processor rounds: a value is compared, in its
own precision, with the limits at which the format's rounding (to nearest, ties to even) changes
what becomes of it. IEEE 754 gives those of fp16; bf16, and e4m3 and e5m2 of the OCP 8-bit
Floating Point Specification, follow from their numbers of bits in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mpcli.precision.formats import dtype_name

CHUNK = 2**18  # elements that are examined at once: what a processor's cache holds


class Format(NamedTuple):
    """A binary floating-point format.

    Args:
        bits: of the stored significand.
        min_exponent: of the least normal number, 2^min_exponent.
        max: the largest finite number.
    """

    dtype: torch.dtype
    bits: int
    min_exponent: int
    max: float

    @property
    def flush_limit(self) -> float:
        """The largest magnitude that rounds to zero: a tie, and zero is even."""
        return 2.0 ** (self.min_exponent - self.bits - 1)

    @property
    def normal_limit(self) -> float:
        """The least magnitude that rounds to a normal number: a tie, and that number is even."""
        return 2.0**self.min_exponent - self.flush_limit

    @property
    def overflow_limit(self) -> float:
        """Halfway from `max` to the number that would follow it."""
        return self.max + 2.0 ** (math.frexp(self.max)[1] - 2 - self.bits)

    def overflows(self, magnitudes: Tensor) -> Tensor:
        """Which magnitudes round to more than `max`. At the limit itself, an even `max` stays."""
        last_bit = self.max / 2.0 ** (math.frexp(self.max)[1] - 1 - self.bits)
        if last_bit % 2:
            return magnitudes >= self.overflow_limit
        return magnitudes > self.overflow_limit


FORMATS = {
    "fp16": Format(torch.float16, 10, -14, 65504.0),
    "bf16": Format(torch.bfloat16, 7, -126, 2.0**128 - 2.0**120),
    "e4m3": Format(torch.float8_e4m3fn, 3, -6, 448.0),
    "e5m2": Format(torch.float8_e5m2, 2, -14, 57344.0),
}


@dataclass
class Outside:
    """How many values lie where a format cannot hold them as they are."""

    above: int = 0  # round to infinity, or to more than its largest number
    below: int = 0  # not zero, and round to zero
    subnormal: int = 0  # round to a subnormal number, which has fewer digits
    error: float = 0.0  # sum of squared rounding errors of what is not above; of fp16 and bf16

    def __add__(self, other: Outside) -> Outside:
        return Outside(
            self.above + other.above,
            self.below + other.below,
            self.subnormal + other.subnormal,
            self.error + other.error,
        )


@dataclass
class Statics:
    """Exact facts about the values of one or more tensors.

    Attributes:
        max: largest finite magnitude.
        squares: sum of the squares of the finite values.
        dtypes: how many values have each type.
        outside: by format.
    """

    elements: int = 0
    zeros: int = 0
    nan: int = 0
    inf: int = 0
    max: float = 0.0
    squares: float = 0.0
    dtypes: dict[str, int] = field(default_factory=dict)
    outside: dict[str, Outside] = field(
        default_factory=lambda: {name: Outside() for name in FORMATS}
    )

    def __add__(self, other: Statics) -> Statics:
        dtypes = dict(self.dtypes)
        for name, number in other.dtypes.items():
            dtypes[name] = dtypes.get(name, 0) + number
        return Statics(
            self.elements + other.elements,
            self.zeros + other.zeros,
            self.nan + other.nan,
            self.inf + other.inf,
            max(self.max, other.max),
            self.squares + other.squares,
            dtypes,
            {name: self.outside[name] + other.outside[name] for name in FORMATS},
        )

    @property
    def nonfinite(self) -> int:
        """How many values are NaN or infinite."""
        return self.nan + self.inf

    @property
    def finite(self) -> int:
        """How many values are neither."""
        return self.elements - self.nonfinite

    @property
    def rms(self) -> float:
        """Root mean square of the finite values."""
        return math.sqrt(self.squares / self.finite) if self.finite else 0.0

    @property
    def headroom(self) -> float | None:
        """Factors of two by which the values may grow before fp16 overflows; None for zeros."""
        return math.log2(FORMATS["fp16"].overflow_limit / self.max) if self.max else None

    def share(self, number: int) -> float:
        """`number` as a share of the finite values that are not zero."""
        candidates = self.finite - self.zeros
        return number / candidates if candidates else 0.0

    def error(self, name: str) -> float:
        """L2 norm of what rounding to fp16 or bf16 changes, over that of the values."""
        return math.sqrt(self.outside[name].error / self.squares) if self.squares else 0.0


def examine(tensor: Tensor) -> Statics:
    """Count a tensor's values.

    Args:
        tensor: of any shape, on the CPU, of a real floating-point type.
    """
    total = Statics(dtypes={dtype_name(tensor.dtype): tensor.numel()})
    for piece in _pieces(tensor.detach()):
        total += _examined(piece)
    return total


def extremes(tensor: Tensor) -> tuple[int, int, float, int]:
    """How many values are NaN and infinite, the largest finite magnitude, how many are zero.

    Args:
        tensor: as for `examine`.
    """
    nan = inf = zeros = 0
    largest = 0.0
    for piece in _pieces(tensor.detach()):
        exact, nans, infs, highest = _finite(piece)
        nan, inf, largest = nan + nans, inf + infs, max(largest, highest)
        zeros += exact.numel() - _count(exact)
    return nan, inf, largest, zeros


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """All values in vectors of at most `CHUNK`: a copy of each piece, never of the whole."""
    if tensor.numel() <= CHUNK:
        yield tensor.reshape(-1)
        return
    # Cut where the halves lie apart in memory, so that pieces need no copy in most layouts.
    dims = (dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1)
    for half in tensor.chunk(2, max(dims, key=tensor.stride)):
        yield from _pieces(half)


def _examined(values: Tensor) -> Statics:
    exact, nan, inf, largest = _finite(values)
    magnitudes = exact.abs()
    zeros = magnitudes.numel() - _count(magnitudes)
    outside = {}
    small = magnitudes  # those below the limits so far: few, after the first format
    for name, form in sorted(FORMATS.items(), key=lambda item: -item[1].normal_limit):
        small = small[small < form.normal_limit]
        below = _count(small <= form.flush_limit) - zeros
        above = form.overflows(magnitudes) if largest >= form.overflow_limit else None
        outside[name] = Outside(
            above=0 if above is None else _count(above),
            below=below,
            subnormal=small.numel() - zeros - below,
            error=_rounding_error(exact, form, above) if form.dtype.itemsize == 2 else 0.0,
        )
    return Statics(
        elements=values.numel(), zeros=zeros, nan=nan, inf=inf, max=largest,
        squares=_squares(exact), outside=outside,
    )  # fmt: skip


def _finite(values: Tensor) -> tuple[Tensor, int, int, float]:
    """The finite values in a precision that has them exactly; how many are NaN and infinite; the
    largest finite magnitude.
    """
    exact = values if values.dtype == torch.float64 else values.float()
    if not exact.numel():
        return exact, 0, 0, 0.0
    low, high = (bound.item() for bound in exact.aminmax())
    if math.isfinite(low) and math.isfinite(high):
        return exact, 0, 0, max(-low, high)
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return finite, _count(exact.isnan()), _count(exact.isinf()), largest


def _rounding_error(exact: Tensor, form: Format, above: Tensor | None) -> float:
    """Sum of the squares of what rounding changes, without what it makes infinite."""
    kept = exact if above is None else exact[~above]
    return _squares(kept - kept.to(form.dtype).to(kept.dtype))


def _count(values: Tensor) -> int:
    """How many are true, or not zero."""
    return int(torch.count_nonzero(values))


def _squares(values: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm * norm
