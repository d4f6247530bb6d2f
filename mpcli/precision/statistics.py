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
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
_FLUSHED, _OVERFLOWED, _DIFFERENCE, _SHADOW, _PRODUCT, _SHADOW_ZEROS = 9, 10, 11, 12, 13, 14
_SCALE, _FOUND_INF = 15, 16
_FIRST_BIN = 17
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
            else they stay on the device.
    """

    def __init__(
        self, device: torch.device, *, through_fp16: bool = False, on_host: bool | None = None
    ) -> None:
        self.device = device
        self.through_fp16 = through_fp16
        self._on_host = device.type == "cpu" if on_host is None else on_host
        self._table = torch.zeros(0, _COLUMNS, dtype=torch.float64, device=device)
        self._host_table = np.zeros((0, _COLUMNS))  # the same memory, if `on_host`
        self._room = torch.zeros(0, device=device)  # for samples, if `on_host`
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
        self._waiting: list[Tensor] = []  # the samples, unless `on_host`
        self._used = 0  # of the room
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
        # First, as it reads a large tensor in order, and what it leaves in the cache is sampled.
        extremes = exact_on_host(tensor) if self._on_host else exact(tensor)
        sample = sampled(tensor, self._next_room(tensor) if self._on_host else None)
        beside = self._shadow.get(key) if shadow is None else sampled(shadow.detach())
        row = _Row(key, tensor.dtype, tensor.numel(), sample.numel(), scaled, beside is not None)
        self._rows.append(row)
        compared = None
        if beside is not None:
            compared = _compared(sample, beside, self._scale if scaled else self._one)
        if self._keep:
            self.kept[key] = sample.clone() if self._on_host else sample
        if not self._on_host:
            self._waiting.append(sample)
        place = self._place(len(self._rows) - 1)
        place[_MAX : _INF + 1] = extremes
        if compared is not None:
            place[_FLUSHED : _SHADOW_ZEROS + 1] = compared

    def add_update(self, key: Key, before: Tensor, after: Tensor, gradient: Tensor | None) -> None:
        """What an optimizer step changed, of one parameter as it is stored.

        Args:
            before, after: the weights, of the same shape and type.
            gradient: that the step used; None where it had none.
        """
        update = after.detach() if before.dtype == torch.float32 else after.detach().float()
        update = update - before.detach()
        number = len(self._rows)
        self.add(update, key)
        if gradient is None or number == len(self._rows):
            return
        self._rows[number].dtype = before.dtype
        place = self._place(number)
        if self._on_host:
            place[_LOST : _MOVING + 1] = _lost_on_host(update, gradient)
            return
        moving = gradient != 0
        place[_LOST] = torch.count_nonzero(moving.logical_and(update == 0))
        place[_MOVING] = torch.count_nonzero(moving)

    def finish(self, found_inf: Tensor | float = 0.0) -> Pending:
        """Begin to copy the table to the host.

        Args:
            found_inf: 1 where the step was skipped.
        """
        rows = tuple(self._rows)
        outcome = torch.stack([self._scale, self._number(found_inf)])
        table = self._table[: len(rows)]
        if rows:
            counts, bins = (
                _counted_on_host(self._room[: self._used], [row.sampled for row in rows])
                if self._on_host
                else _counted_together(self._waiting)
            )
            table[:, _SQUARES : _TIES + 1], table[:, _FIRST_BIN:] = counts, bins
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

    def _next_room(self, tensor: Tensor) -> Tensor:
        """For its sample. A step's samples are kept in one piece.

        Small pieces between the activations would keep the allocator from using memory again.
        """
        begin, self._used = self._used, self._used + min(tensor.numel(), SAMPLED)
        if self._used > len(self._room):
            more = self._room.new_empty(max(64 * SAMPLED, len(self._room)))
            self._room = torch.cat([self._room, more])
        return self._room[begin : self._used]

    def _place(self, number: int) -> Any:
        """A row of the table, to write to."""
        if number == len(self._table):
            more = self._table.new_zeros(max(64, number), _COLUMNS)
            self._table = torch.cat([self._table, more])
            if self._on_host:
                self._host_table = self._table.numpy()
        return self._host_table[number] if self._on_host else self._table[number]


@dataclass(frozen=True)
class Pending:
    """A table that is, or is being, copied to the host; `ready` is None where it is there."""

    rows: tuple[_Row, ...]
    table: Tensor
    ready: torch.cuda.Event | None
    through_fp16: bool

    def records(self, step: int, attempt: int, *, wait: bool = True) -> list[LayerRecord] | None:
        """Rows of `layers.jsonl`; None while the copy is under way and `wait` is off."""
        if self.ready is not None and not self.ready.query():
            if not wait:
                return None
            self.ready.synchronize()
        return _records(self.rows, self.table.numpy(), step, attempt, self.through_fp16)


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


def sampled(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    """A copy of at most `SAMPLED` of the elements, in the order of their indices, as fp32.

    Tensors of one shape give the same elements, however they lie in memory.
    """
    if out is None:
        out = torch.empty(min(tensor.numel(), SAMPLED), device=tensor.device)
    if tensor.numel() <= SAMPLED:
        out.view(tensor.shape).copy_(tensor)
        return out
    offsets = _offsets(tensor.shape, tensor.stride(), tensor.device)
    flat = tensor.as_strided((_span(tensor.shape, tensor.stride()),), (1,))
    if tensor.dtype == torch.float32:
        return torch.index_select(flat, 0, offsets, out=out)
    return out.copy_(flat.index_select(0, offsets))


@functools.lru_cache(maxsize=128)  # of 64 KiB each, or 128
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
    return offsets.to(device, torch.int32 if _span(shape, stride) <= 2**31 else torch.int64)


def _span(shape: torch.Size, stride: tuple[int, ...]) -> int:
    """From the first element in memory to the last one."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _lost_on_host(update: Tensor, gradient: Tensor) -> tuple[int, int]:
    """`_LOST` and `_MOVING`; numpy compares and counts 10 times as fast as torch on a CPU."""
    if gradient.dtype == torch.bfloat16:  # which numpy has not
        gradient = gradient.float()
    moving = gradient.detach().numpy() != 0
    lost = moving & (update.numpy() == 0)
    return int(np.count_nonzero(lost)), int(np.count_nonzero(moving))


def _counted_on_host(values: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """On a CPU: 4 counts (`_SQUARES` to `_TIES`) and the 256 bins of each sample.

    The bins are counted together, since calls are most of the time that small tensors take. Looking
    costs nothing on a CPU, so what the bins say is not there is not counted.

    Args:
        values: all samples, one after the other.
    """
    ends = [0, *itertools.accumulate(lengths)]
    places = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
    bits = values.numpy().view(np.int32) & _MAGNITUDE
    key = bits >> _MANTISSA
    for row, place in enumerate(places):
        key[place] += row * _BINS
    all_bins = torch.bincount(torch.from_numpy(key), minlength=len(lengths) * _BINS)
    bins = all_bins.view(-1, _BINS).numpy()
    counts = np.zeros((len(lengths), 4))
    small, large = bins[:, : _BIAS - 40], bins[:, _BIAS + 41 :]
    # Where no square that matters leaves fp32: the largest has a normal one.
    plain = (bins.sum(axis=1) > small.sum(axis=1)) & (large.sum(axis=1) == 0)
    for row, sample in enumerate(values.split(lengths)):
        if not plain[row]:
            sample = sample[sample.isfinite()].double()
        counts[row, 0] = torch.dot(sample, sample).item()
    for row in np.flatnonzero(bins[:, 0]).tolist():
        counts[row, 1] = np.count_nonzero(bits[places[row]] == 0)
    for row in np.flatnonzero(bins[:, _LIMIT_BIN:].sum(axis=1)).tolist():
        part = bits[places[row]]
        counts[row, 2] = np.count_nonzero((part >= _LIMIT) & (part <= _INFINITY))
    for row in np.flatnonzero(bins[:, _TIE_BIN]).tolist():
        counts[row, 3] = np.count_nonzero(bits[places[row]] == _TIE)
    return torch.from_numpy(counts), torch.from_numpy(bins)


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
    """[6] fp64: the columns `_FLUSHED` to `_SHADOW_ZEROS`; three of them are sums of products.

    Elements where either is not finite are in no sum.
    """
    finite = shadow.isfinite()
    both = finite & sample.isfinite()
    exact = torch.where(both, shadow.double(), 0)
    difference = torch.where(both, sample.double() / scale, 0) - exact
    return torch.stack(
        [
            torch.count_nonzero((sample == 0) & (shadow != 0)),
            torch.count_nonzero(finite & ~both),
            torch.dot(difference, difference),
            torch.dot(exact, exact),
            torch.dot(difference + exact, exact),
            torch.count_nonzero(shadow == 0),
        ]
    )


def _records(
    rows: Sequence[_Row],
    table: NDArray[np.float64],
    step: int,
    attempt: int,
    through_fp16: bool,
) -> list[LayerRecord]:
    """The table in the terms of `layers.jsonl`."""
    all_counts = table[:, _FIRST_BIN : _FIRST_BIN + _BINS - 1].astype(np.int64)  # of what is finite
    num_finite = all_counts.sum(axis=1).tolist()
    all_counts[:, 0] -= table[:, _ZEROS].astype(np.int64)
    up_to = all_counts.cumsum(axis=1)
    filled = all_counts != 0
    firsts = filled.argmax(axis=1).tolist()
    ends = (_BINS - 1 - filled[:, ::-1].argmax(axis=1)).tolist()
    found: list[LayerRecord] = []
    weight_rms: dict[str, float] = {}
    for number, row in enumerate(rows):
        values, first = table[number, :_FIRST_BIN].tolist(), firsts[number]
        empty = not filled[number, first]
        scale = values[_SCALE] if row.scaled else 1.0
        gone = through_fp16 and row.key.kind in ("output", "grad_output", "grad")
        rms = math.sqrt(values[_SQUARES] / num_finite[number]) if num_finite[number] else 0.0
        flushes = ratio = lost = None
        if row.dtype != torch.float16 and not gone:
            flushes = (int(up_to[number, _TIE_BIN - 1]) + values[_TIES]) / row.sampled
        if row.key.kind == "weight":
            weight_rms[row.key.name] = rms
        if row.key.kind == "update":
            if of_weight := weight_rms.get(row.key.name):
                ratio = rms / of_weight
            if values[_MOVING] and not values[_FOUND_INF]:  # a skipped step lost nothing
                lost = values[_LOST] / values[_MOVING]
        found.append(
            LayerRecord(
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
                max=values[_MAX],
                rms=rms,
                zeros=values[_ZEROS] / row.sampled,
                nan=int(values[_NAN]),
                inf=int(values[_INF]),
                at_least_65520=values[_AT_LIMIT] / row.sampled,
                subnormal=int(up_to[number, _BIAS + _least_normal(row.dtype) - 1]) / row.sampled,
                would_flush=flushes,
                lowest_exponent=None if empty else first - _BIAS,
                exponents=() if empty else tuple(all_counts[number, first : ends[number]].tolist()),
                lowest_unscaled_exponent=None if empty else first - _BIAS - math.log2(scale),
                update_ratio=ratio,
                lost=lost,
                shadow=_comparison(values, row.sampled) if row.has_shadow else None,
            )
        )
    return found


@functools.cache
def _least_normal(dtype: torch.dtype) -> int:
    """Exponent of a type's least normal number, of those that fp32 has."""
    return max(round(math.log2(torch.finfo(dtype).tiny)), 1 - _BIAS)


def _comparison(values: list[float], sampled: int) -> ShadowComparison:
    flushed, overflowed, difference, shadow, product, zeros = values[_FLUSHED : _SHADOW_ZEROS + 1]
    error = math.sqrt(difference / shadow) if shadow else math.inf if difference else 0.0
    squares = difference - shadow + 2 * product  # of the tensor itself
    lengths = math.sqrt(max(squares, 0.0) * shadow)
    return ShadowComparison(
        flushed=flushed / sampled,
        overflowed=overflowed / sampled,
        error=error,
        cosine=min(1.0, max(-1.0, product / lengths)) if lengths else None,
        rms=math.sqrt(shadow / sampled),
        zeros=zeros / sampled,
    )
