"""What a finished run of a loss-scale sweep says of its gradients: fields of its `TrialResult`.

Which gradients fp16 holds is found out from the run in fp16 itself. An output's gradient has the
output's type: behind a norm, a softmax or a loss in fp32 it is not rounded. The gradient of a
weight is fp32 under autocast, but its values come out of a product in half where its module
multiplies in half; those of a norm's weights do not. A weight that is stored in half has a gradient
in half.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpcli.records import LayerRecord, ModuleTypes
from mpcli.rundir import RunDirectory
from mpcli.sweep.results import Fractions, GradientError, GradientHistogram, LayerFractions

CANCELLED = 2.0**-16
"""RMS of a bias's gradient over that of a random walk of the values that it sums, at which these
cancel: what is left is the rounding of fp32 (2^-24 of each value; measured 2^-22), and fp16 has
another rounding. So it is with the bias of attention's keys, which a softmax does not see, and of a
convolution in front of a batch norm. What a scale does to noise says nothing. The limit is
judgement: far above that rounding, and far below what any bias that matters has."""
_NORMAL = -14  # exponent of fp16's least normal number


def evidence_of(run: RunDirectory) -> dict[str, Any]:
    """The fields that a run's sampled steps fill.

    Returns:
        of a run in fp32 `histograms` and `outputs_max`, of one with fp32 shadows `layers` and
        `gradient_error`; nothing where no step was sampled.
    """
    rows = [row for row in run.layers() if row.tensor in ("output", "grad_output", "grad")]
    if not rows:
        return {}
    gradients = _without_cancelled([row for row in rows if row.tensor != "output"])
    if not any(row.shadow for row in rows):
        return {
            # What is infinite in fp32 is so at every scale, and says nothing of any.
            "histograms": tuple(
                map(histogram_of, _by_tensor(row for row in gradients if not row.inf))
            ),
            "outputs_max": _outputs_max(rows),
        }
    types = run.observed()
    held = [row for row in gradients if row.shadow and _is_half(row, types)]
    error = _gradient_error([row for row in rows if row.tensor == "grad" and row.shadow])
    return {"layers": tuple(map(_fractions, _by_tensor(held))), "gradient_error": error}


def _is_half(row: LayerRecord, types: Mapping[str, ModuleTypes]) -> bool:
    """Whether a gradient's values were rounded to fp16."""
    if row.dtype == "fp16" or row.tensor != "grad":
        return row.dtype == "fp16"
    return row.module in types and "fp16" in types[row.module].operands


def _rms(row: LayerRecord) -> float:
    """Of the gradient in fp32."""
    return row.rms if row.shadow is None else row.shadow.rms or 0.0


def _without_cancelled(rows: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Without the gradients of biases that are nothing but rounding."""
    outputs = {
        (row.step, row.name): row for row in rows if row.tensor == "grad_output" and not row.call
    }

    def is_rounding(row: LayerRecord) -> bool:
        summed = outputs.get((row.step, row.module))
        if row.tensor != "grad" or summed is None or row.name.rpartition(".")[2] != "bias":
            return False
        walk = math.sqrt(summed.elements / row.elements) * _rms(summed)
        return _rms(row) < CANCELLED * walk

    names = {row.name for row in rows if is_rounding(row)}
    return [row for row in rows if row.tensor != "grad" or row.name not in names]


def _by_tensor(rows: Iterable[LayerRecord]) -> list[list[LayerRecord]]:
    """The rows of each tensor, over calls and moments, in the order of their first one."""
    groups: dict[tuple[str, str], list[LayerRecord]] = defaultdict(list)
    for row in rows:
        groups[row.tensor, row.name].append(row)
    return list(groups.values())


def _mean(rows: Sequence[LayerRecord], shares: Iterable[float]) -> float:
    """Of all elements of the rows together."""
    return statistics.fmean(shares, weights=[row.elements for row in rows])


def _elements(rows: Sequence[LayerRecord]) -> int:
    """Of one moment."""
    return sum(row.elements for row in rows if row.step == rows[0].step)


def histogram_of(rows: Sequence[LayerRecord]) -> GradientHistogram:
    """Of one tensor, from its rows of fp32 without a loss scale, over calls and moments."""
    return GradientHistogram(
        module=rows[0].module,
        tensor="grad" if rows[0].tensor == "grad" else "grad_output",
        name=rows[0].name,
        elements=_elements(rows),
        max=max(row.max for row in rows),
        zeros=_mean(rows, [row.zeros for row in rows]),
        **summed(
            (row.lowest_exponent, [count * row.elements / row.sampled for count in row.exponents])
            for row in rows
        ),
    )


def summed(parts: Iterable[tuple[int | None, Sequence[float]]]) -> dict[str, Any]:
    """`lowest` and `counts` of all together, from those of each."""
    total: dict[int, float] = defaultdict(float)
    for lowest, counts in parts:
        for exponent, count in enumerate(counts, lowest or 0):
            total[exponent] += count
    bins = range(min(total, default=0), max(total, default=-1) + 1)
    return {
        "lowest": min(total, default=None),
        "counts": tuple(round(total[exponent]) for exponent in bins),
    }


def _outputs_max(rows: Sequence[LayerRecord]) -> dict[str, float]:
    largest: dict[str, float] = defaultdict(float)
    for row in rows:
        if row.tensor == "output":
            largest[row.module] = max(largest[row.module], row.max)
    return dict(largest)


def _fractions(rows: Sequence[LayerRecord]) -> LayerFractions:
    shadows = [row.shadow for row in rows if row.shadow]
    nonzero = 1 - _mean(rows, [shadow.zeros or 0.0 for shadow in shadows])

    def of_nonzero(shares: Iterable[float]) -> float:
        return min(1.0, _mean(rows, shares) / nonzero) if nonzero else 0.0

    return LayerFractions(
        module=rows[0].module,
        tensor="grad" if rows[0].tensor == "grad" else "grad_output",
        name=rows[0].name,
        elements=_elements(rows),
        fractions=Fractions(
            underflow=of_nonzero(shadow.flushed for shadow in shadows),
            subnormal=of_nonzero(map(_subnormal, rows)),
            overflow=of_nonzero(shadow.overflowed for shadow in shadows),
        ),
    )


def _subnormal(row: LayerRecord) -> float:
    """Share of the elements that are below fp16's least normal number, whatever the row's type."""
    if row.lowest_exponent is None:
        return 0.0
    return sum(row.exponents[: max(0, _NORMAL - row.lowest_exponent)]) / row.sampled


def _gradient_error(rows: Sequence[LayerRecord]) -> GradientError | None:
    """The mean over the moments whose gradients are finite; None without any."""
    moments = [list(_moment(rows, step)) for step in sorted({row.step for row in rows})]
    errors = [error for moment in moments for error in moment]
    if not errors:
        return None
    return GradientError(
        cosine=statistics.fmean(error.cosine for error in errors),
        relative=statistics.fmean(error.relative for error in errors),
    )


def _moment(rows: Iterable[LayerRecord], step: int) -> Iterable[GradientError]:
    """Of all parameters together: their own numbers say what those of the sums are."""
    own = exact = product = difference = 0.0
    for row in rows:
        if row.step != step or row.shadow is None:
            continue
        if row.nan or row.inf:
            return
        length = math.sqrt(row.elements) * row.rms / row.scale
        exact_length = math.sqrt(row.elements) * _rms(row)
        own += length**2
        exact += exact_length**2
        product += (row.shadow.cosine or 0.0) * length * exact_length
        # Where the shadow is zero its error is infinite.
        difference += (row.shadow.error * exact_length) ** 2 if exact_length else length**2
    if exact:
        lengths = math.sqrt(own * exact)
        yield GradientError(
            cosine=min(1.0, product / lengths) if lengths else 0.0,
            relative=math.sqrt(difference / exact),
        )
