"""What the tensors of one step are like: range, zeros, NaN, exponents. Nothing is read on a GPU.

Of every tensor the largest magnitude and the numbers of NaN and infinities are exact; everything
else is of a sample of at most 16,384 elements, spread evenly over the tensor and the same for every
tensor of a shape. The standard error of a share is at most 0.4 percentage points, and 0 for
tensors that are no larger.

The exponent of a number is read from the bits of its fp32 form (IEEE 754): fp16 and bf16 numbers
all have one, without rounding. The limits of fp16 are those of its rounding, to nearest and to
even: |x| <= 2^-25 becomes 0, |x| >= 65520 becomes infinite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpcli.precision.formats import dtype_name
from mpcli.records import LayerRecord, ShadowComparison

SAMPLED = 16384
Kind = Literal["output", "grad_output", "weight", "grad", "update"]

_MAGNITUDE = 0x7FFFFFFF  # the bits of an fp32 number without its sign
_MANTISSA = 23  # bits
_BIAS = 127
_BINS = 256  # by the exponent's bits: bin 0 holds zeros and subnormals, bin 255 inf and NaN
_TIE = 0x33000000  # bits of 2^-25: the largest number that fp16 rounds to 0
_TIE_BIN = _BIAS - 25
_LIMIT = 0x477FF000  # bits of 65520: the least number that fp16 rounds to infinity
_LIMIT_BIN = _BIAS + 15
_INFINITY = 0x7F800000

# Columns of the table; the bins follow.
_MAX, _NAN, _INF, _SQUARES, _ZEROS, _AT_LIMIT, _TIES = range(7)
_LOST, _MOVING = 7, 8  # elements: unchanged though the gradient is not 0; with such a gradient
_FLUSHED, _OVERFLOWED, _DIFFERENCE, _SHADOW = 9, 10, 11, 12
_SCALE, _FOUND_INF = 13, 14
_FIRST_BIN = 15
_COLUMNS = _FIRST_BIN + _BINS


@dataclass(frozen=True)
class Key:
    """Which tensor of a step; `name` is that of the parameter, or of the module with the output."""

    module: str
    kind: Kind
    name: str
    call: int = 0


@dataclass
class _Row:
    """What the host knows of a row at once."""

    key: Key
    dtype: torch.dtype
    elements: int
    sampled: int
    scaled: bool
    has_shadow: bool


class Samples:
    """The table of one step's tensors, filled on their device; the next step fills it again.

    Args:
        device: of the tensors.
        through_fp16: activations and gradients went through fp16, so what it flushes is gone: it is
            not counted there.
        on_host: read the numbers as they come, which costs nothing on a CPU, and is faster there;
            else they stay on the device, and all samples are counted together, with few kernels.
    """

    def __init__(
        self, device: torch.device, *, through_fp16: bool = False, on_host: bool | None = None
    ) -> None:
        self.device = device
        self.through_fp16 = through_fp16
        self._on_host = device.type == "cpu" if on_host is None else on_host
        self._table = torch.zeros(0, _COLUMNS, dtype=torch.float64, device=device)
        self._one = torch.ones((), dtype=torch.float64, device=device)
        self.begin(1.0)

    def begin(
        self,
        scale: Tensor | float,
        shadow: Mapping[Key, Tensor] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        """Forget the step before.

        Args:
            scale: loss scale of the step.
            shadow: `kept` of the same step's fp32 shadow, unscaled.
            keep: the samples themselves, as `kept`.
        """
        self._scale = self._number(scale)
        self._shadow = shadow or {}
        self._keep = keep
        self.kept: dict[Key, Tensor] = {}
        self._rows: list[_Row] = []
        self._waiting: list[Tensor] = []  # a sample for each row
        self._values: list[NDArray[np.float64]] = []
        self._table.zero_()

    def add(
        self, tensor: Tensor, key: Key, *, scaled: bool = False, shadow: Tensor | None = None
    ) -> None:
        """One tensor as it is now.

        Args:
            tensor: floating-point, of any shape and memory format; not empty.
            scaled: its values are multiplied by the loss scale.
            shadow: what it would be in fp32, unscaled, of the same shape.
        """
        if not tensor.numel() or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            return
        tensor = tensor.detach()
        sample = sampled(tensor)
        beside = self._shadow.get(key) if shadow is None else sampled(shadow.detach())
        row = _Row(key, tensor.dtype, tensor.numel(), len(sample), scaled, beside is not None)
        self._rows.append(row)
        compared = None
        if beside is not None:
            compared = _compared(sample, beside, self._scale if scaled else self._one)
        if self._keep:
            self.kept[key] = sample
        if self._on_host:
            values = np.zeros(_COLUMNS)
            values[_MAX : _INF + 1] = exact_on_host(tensor)
            values[_SQUARES : _TIES + 1], values[_FIRST_BIN:] = _counted(sample)
            if compared is not None:
                values[_FLUSHED : _SHADOW + 1] = compared.numpy()
            self._values.append(values)
            return
        place = self._next_place()
        place[_MAX : _INF + 1] = exact(tensor)
        if compared is not None:
            place[_FLUSHED : _SHADOW + 1] = compared
        self._waiting.append(sample)

    def add_update(self, key: Key, before: Tensor, after: Tensor, gradient: Tensor | None) -> None:
        """What an optimizer step changed, of one parameter as it is stored.

        Args:
            before, after: the weights, of the same shape and type.
            gradient: that the step used; None where it had none.
        """
        update = after.detach() if before.dtype == torch.float32 else after.detach().float()
        update = update - before
        number = len(self._rows)
        self.add(update, key)
        if gradient is None or number == len(self._rows):
            return
        self._rows[number].dtype = before.dtype
        moving = gradient != 0
        num_moving = torch.count_nonzero(moving)
        num_lost = torch.count_nonzero(moving.logical_and_(update == 0))
        if self._on_host:
            self._values[number][_LOST : _MOVING + 1] = num_lost.item(), num_moving.item()
        else:
            self._table[number, _LOST] = num_lost
            self._table[number, _MOVING] = num_moving

    def finish(self, found_inf: Tensor | float = 0.0) -> Pending:
        """Begin to copy the table to the host.

        Args:
            found_inf: 1 where the step was skipped.
        """
        rows = tuple(self._rows)
        outcome = torch.stack([self._scale, self._number(found_inf)])
        if self._on_host:
            for values in self._values:
                values[_SCALE : _FOUND_INF + 1] = outcome.numpy()
            return Pending(rows, self._values, None, self.through_fp16)
        table = self._table[: len(rows)]
        if self._waiting:
            table[:, _SQUARES : _TIES + 1], table[:, _FIRST_BIN:] = _counted_together(self._waiting)
        table[:, _SCALE : _FOUND_INF + 1] = outcome
        if self.device.type != "cuda":
            return Pending(rows, table.clone(), None, self.through_fp16)
        host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
        host.copy_(table, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Pending(rows, host, ready, self.through_fp16)

    def _number(self, value: Tensor | float) -> Tensor:
        """As a scalar on the device, which nobody waits for."""
        if isinstance(value, Tensor):
            return value.detach().to(self.device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def _next_place(self) -> Tensor:
        """The row of the table for the tensor that was noted last."""
        if len(self._rows) > len(self._table):
            more = self._table.new_zeros(max(64, len(self._table)), _COLUMNS)
            self._table = torch.cat([self._table, more])
        return self._table[len(self._rows) - 1]


@dataclass(frozen=True)
class Pending:
    """A table that is, or is being, copied to the host; `ready` is None where it is there."""

    rows: tuple[_Row, ...]
    table: Tensor | list[NDArray[np.float64]]
    ready: torch.cuda.Event | None
    through_fp16: bool

    def records(self, step: int, attempt: int, *, wait: bool = True) -> list[LayerRecord] | None:
        """Rows of `layers.jsonl`; None while the copy is under way and `wait` is off."""
        if self.ready is not None and not self.ready.query():
            if not wait:
                return None
            self.ready.synchronize()
        found: list[LayerRecord] = []
        weight_rms: dict[str, float] = {}
        table = self.table if isinstance(self.table, list) else self.table.numpy()
        for row, values in zip(self.rows, table, strict=True):
            record = _record(row, values, step, attempt, self.through_fp16)
            if row.key.kind == "weight":
                weight_rms[row.key.name] = record.rms
            if row.key.kind == "update":
                record = _with_update(record, values, weight_rms.get(row.key.name))
            found.append(record)
        return found


def exact(tensor: Tensor) -> Tensor:
    """Largest magnitude of what is not NaN, and the numbers of NaN and of infinities.

    Returns:
        [3] fp64 on the tensor's device.
    """
    tensor = _as_stored(tensor)
    nan = tensor.isnan()
    magnitude = torch.where(nan, 0, tensor).abs_()
    infinite = torch.count_nonzero(magnitude == math.inf)
    return torch.stack([magnitude.amax().double(), torch.count_nonzero(nan), infinite])


def exact_on_host(tensor: Tensor) -> tuple[float, float, float]:
    """The same numbers, of a tensor on a CPU: one pass where everything is finite."""
    low, high = torch.aminmax(_as_stored(tensor))
    largest = max(-low.item(), high.item())
    if math.isfinite(largest):  # NaN spreads to both
        return largest, 0.0, 0.0
    largest, nan, infinite = exact(tensor).tolist()
    return largest, nan, infinite


def _as_stored(tensor: Tensor) -> Tensor:
    """Its dimensions as they lie in memory: reductions of channels-last tensors are 5x slower."""
    if tensor.is_contiguous():
        return tensor
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d]))


def sampled(tensor: Tensor) -> Tensor:
    """A copy of at most `SAMPLED` of the elements, in the order of their indices, as fp32.

    Tensors of one shape give the same elements, however they lie in memory.
    """
    if tensor.numel() <= SAMPLED:
        return tensor.reshape(-1).to(torch.float32, copy=True)
    offsets = _offsets(tensor.shape, tensor.stride(), tensor.device)
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).index_select(0, offsets).float()


@functools.lru_cache(maxsize=128)  # of 128 KiB each
def _offsets(shape: torch.Size, stride: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the sampled elements lie: one at random in each of `SAMPLED` equal stretches."""
    generator = torch.Generator().manual_seed(0)
    stretch = shape.numel() / SAMPLED
    jitter = torch.rand(SAMPLED, generator=generator, dtype=torch.float64)
    index = ((torch.arange(SAMPLED) + jitter) * stretch).long().clamp_(max=shape.numel() - 1)
    offsets = torch.zeros_like(index)
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        offsets += index % size * step
        index //= size
    return offsets.to(device)


def _counted(sample: Tensor) -> tuple[list[float], NDArray[np.int64]]:
    """On a CPU: 4 counts (`_SQUARES` to `_TIES`) and the 256 bins of a sample.

    Looking costs nothing there, so what cannot be is not counted; and numpy is called faster than
    torch, which is most of the time that a small tensor takes.
    """
    values = sample.numpy()
    bits = values.view(np.int32) & _MAGNITUDE
    bins = np.bincount(bits >> _MANTISSA, minlength=_BINS)
    highest = np.flatnonzero(bins)[-1]
    if _BIAS - 40 <= highest <= _BIAS + 40:  # no square that matters leaves fp32
        squares = torch.dot(sample, sample).item()
    else:
        finite = values[np.isfinite(values)]
        squares = np.square(finite, dtype=np.float64).sum().item()
    counts = [squares, 0.0, 0.0, 0.0]
    if bins[0]:
        counts[1] = float(len(values) - np.count_nonzero(bits))
    if highest >= _LIMIT_BIN:
        counts[2] = float(np.count_nonzero((bits >= _LIMIT) & (bits <= _INFINITY)))
    if bins[_TIE_BIN]:
        counts[3] = float(np.count_nonzero(bits == _TIE))
    return counts, bins


def _counted_together(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same of many samples, [rows, 4] and [rows, 256], with few kernels and no host read.

    `bincount` would wait for a GPU; adding ones in place does not.
    """
    values = torch.cat(samples)
    lengths = torch.tensor([len(sample) for sample in samples])
    if values.is_cuda:  # from other memory the copy would wait
        lengths = lengths.pin_memory().to(values.device, non_blocking=True)
    row = torch.repeat_interleave(lengths, output_size=len(values))
    bits = values.view(torch.int32) & _MAGNITUDE
    exponent = bits >> _MANTISSA
    key = row * _BINS + exponent
    bins = torch.zeros(len(samples) * _BINS, dtype=torch.float64, device=values.device)
    bins.scatter_add_(0, key, torch.ones_like(key, dtype=torch.float64))
    finite = torch.where(exponent < _BINS - 1, values, 0).double()
    columns = torch.stack(
        [finite.square_(), bits == 0, (bits >= _LIMIT) & (bits <= _INFINITY), bits == _TIE]
    )
    counts = torch.zeros(4, len(samples), dtype=torch.float64, device=values.device)
    counts.index_add_(1, row, columns)
    return counts.T, bins.view(-1, _BINS)


def _compared(sample: Tensor, shadow: Tensor, scale: Tensor) -> Tensor:
    """[4] fp64: `_FLUSHED`, `_OVERFLOWED`, and the sums of squares `_DIFFERENCE` and `_SHADOW`.

    Elements where either is not finite have no difference.
    """
    finite = shadow.isfinite()
    both = finite & sample.isfinite()
    difference = torch.where(both, sample.double() / scale - shadow.double(), 0)
    return torch.stack(
        [
            torch.count_nonzero((sample == 0) & (shadow != 0)),
            torch.count_nonzero(finite & ~both),
            difference.square_().sum(),
            torch.where(both, shadow.double(), 0).square_().sum(),
        ]
    )


def _record(
    row: _Row, values: NDArray[np.float64], step: int, attempt: int, through_fp16: bool
) -> LayerRecord:
    """A row in the terms of `layers.jsonl`."""
    counts = values[_FIRST_BIN : _FIRST_BIN + _BINS - 1].astype(np.int64)  # of what is finite
    largest, nan, inf, squares, zeros, at_limit, ties = values[: _TIES + 1].tolist()
    num_finite = int(counts.sum())
    counts[0] -= int(zeros)
    filled = np.flatnonzero(counts)
    lowest = int(filled[0]) - _BIAS if len(filled) else None
    scale = values[_SCALE].item() if row.scaled else 1.0
    gone = through_fp16 and row.key.kind in ("output", "grad_output", "grad")
    flushes = None
    if row.dtype != torch.float16 and not gone:
        flushes = (int(counts[:_TIE_BIN].sum()) + ties) / row.sampled
    return LayerRecord(
        step=step,
        attempt=attempt,
        module=row.key.module,
        tensor=row.key.kind,
        name=row.key.name,
        call=row.key.call,
        dtype=dtype_name(row.dtype),
        scale=scale,
        elements=row.elements,
        sampled=row.sampled,
        max=largest,
        rms=math.sqrt(squares / num_finite) if num_finite else 0.0,
        zeros=zeros / row.sampled,
        nan=int(nan),
        inf=int(inf),
        at_least_65520=at_limit / row.sampled,
        subnormal=int(counts[: _BIAS + _least_normal(row.dtype)].sum()) / row.sampled,
        would_flush=flushes,
        lowest_exponent=lowest,
        exponents=tuple(counts[filled[0] : filled[-1] + 1].tolist()) if len(filled) else (),
        lowest_unscaled_exponent=None if lowest is None else lowest - math.log2(scale),
        shadow=_comparison(values, row.sampled) if row.has_shadow else None,
    )


@functools.cache
def _least_normal(dtype: torch.dtype) -> int:
    """Exponent of a type's least normal number, of those that fp32 has."""
    return max(round(math.log2(torch.finfo(dtype).tiny)), 1 - _BIAS)


def _comparison(values: NDArray[np.float64], sampled: int) -> ShadowComparison:
    flushed, overflowed, difference, shadow = values[_FLUSHED : _SHADOW + 1].tolist()
    error = math.sqrt(difference / shadow) if shadow else math.inf if difference else 0.0
    return ShadowComparison(flushed=flushed / sampled, overflowed=overflowed / sampled, error=error)


def _with_update(
    record: LayerRecord, values: NDArray[np.float64], weight_rms: float | None
) -> LayerRecord:
    """What only an update has; a step that was skipped lost nothing."""
    about: dict[str, float] = {}
    if weight_rms:
        about["update_ratio"] = record.rms / weight_rms
    if values[_MOVING] and not values[_FOUND_INF]:
        about["lost"] = float(values[_LOST] / values[_MOVING])
    return record.model_copy(update=about)
