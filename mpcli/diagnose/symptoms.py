"""What has to go away for a fix to be one, and how that is told from noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mpcli.diagnose.finding import Finding, FindingId
from mpcli.diagnose.rerun import Rerun

TOLERANCE = 0.05
"""Share of the loss by which two reruns may differ and be as good as each other. After 32 steps of
four small models losses scatter by 6 to 10% from seed to seed, and sound precisions are at most
2.2% apart."""
HALF = 0.5
"""Of a share or an error that a fix has to bring down: one more bit of exponent or mantissa halves
what rounding does."""
FEW_SKIPS = 0.05
"""Share of steps that a dynamic scale may skip when it has found its level."""
SAVED = 0.95
"""Time or memory that is no saving above that."""


class Symptom(NamedTuple):
    """What is measured of a rerun.

    Args:
        what: for people, with its unit.
        measure: of a rerun; layers of the finding say where.
        is_gone: whether a value with the fix is sound, beside the value without it.
    """

    what: str
    measure: Callable[[Rerun, Finding], float]
    is_gone: Callable[[float, float], bool]


def _skipped(rerun: Rerun, finding: Finding) -> float:
    """In the second half: a dynamic scale needs 16 steps at most to fall from 2^16 to 1."""
    late = rerun.rows[len(rerun.rows) // 2 :]
    return sum(not row.applied for row in late) / len(late)


def _error(rerun: Rerun, finding: Finding) -> float:
    errors = [rerun.errors[name] for name in finding.layers if name in rerun.errors]
    return max(errors or rerun.errors.values(), default=0.0)


def _none(now: float, before: float) -> bool:
    return now == 0


def _halved(now: float, before: float) -> bool:
    return now == 0 or (math.isfinite(now) and now <= HALF * before)


def _saved(now: float, before: float) -> bool:
    return now <= SAVED * before


_BROKEN = Symptom(
    "steps with NaN or infinity that no lower loss scale mends", lambda c, f: c.broken, _none
)
_SKIPPED = Symptom(
    "share of steps skipped, of the second half", _skipped, lambda now, _: now <= FEW_SKIPS
)
_FLUSHED = Symptom(
    "share of gradients that become zero and are not in fp32", lambda c, f: c.flushed, _halved
)
_LOST = Symptom("share of updates that change no weight", lambda c, f: c.lost, _halved)
_ERROR = Symptom("relative difference of outputs from fp32", _error, _halved)
_LOSS = Symptom("loss", lambda c, f: mean(c.last_losses), lambda now, before: True)
_TIME = Symptom("seconds of a step", lambda c, f: c.seconds, _saved)
_MEMORY = Symptom("bytes of memory", lambda c, f: c.peak_memory, _saved)

SYMPTOMS: dict[FindingId, Symptom] = {
    "forward-overflow": _BROKEN,
    "forward-nonfinite": _BROKEN,
    "backward-nonfinite": _BROKEN,
    "scale-collapse": _BROKEN,
    "batchnorm-stats": _BROKEN,
    "attention-logits": _BROKEN,
    "weights-exceed-fp16": _BROKEN,
    "optimizer-state-corrupted": _BROKEN,
    "bad-batch": _BROKEN,
    "skip-storm": _SKIPPED,
    "scale-too-high": _SKIPPED,
    "underflow": _FLUSHED,
    "lost-updates": _LOST,
    "norm-in-half": _ERROR,
    "half-reduction": _ERROR,
    "learning-rate": _LOSS,
    "exploding-gradients": _LOSS,
    "vanishing-gradients": _LOSS,
    "adam-eps": _LOSS,
    "accumulation": _LOSS,
    "autocast-inactive": _TIME,
    "fp32-island": _TIME,
    "out-of-memory": _MEMORY,
}
"""By finding. What is not here, steps do not show: a bad checkpoint, a machine that errs."""


def symptom_of(finding: Finding, without: Rerun) -> Symptom | None:
    """What to measure; None where the steps without a fix do not show it, so that nothing can go.

    Where outputs should be compared with fp32 and steps break, the broken steps are the symptom.
    """
    symptom = SYMPTOMS.get(finding.id)
    if symptom is _ERROR and without.broken:
        symptom = _BROKEN
    if symptom is None or symptom is _LOSS:
        return symptom
    value = symptom.measure(without, finding)
    return None if symptom.is_gone(value, value) else symptom


def judged(symptom: Symptom, finding: Finding, without: Rerun, with_it: Rerun) -> tuple[bool, str]:
    """Whether a fix is one, and why: the symptom is gone, and the loss is finite and no worse.

    Losses of the last quarter of the steps are compared pairwise, as both reruns have the same
    batches: a difference below twice the standard error of its mean, or below `TOLERANCE` of the
    loss, does not count. Where no pair is finite, the loss must not be above that of the first
    quarter. Where the loss is the symptom it has to be lower, and not above the first quarter.
    """
    bad = [loss for loss in with_it.last_losses if not math.isfinite(loss)]
    if bad:
        return (
            False,
            f"the loss is {bad[0]} in {len(bad)} of the last {len(with_it.last_losses)} steps",
        )
    before, now = symptom.measure(without, finding), symptom.measure(with_it, finding)
    if not symptom.is_gone(now, before):
        return False, f"{symptom.what}: {now:.3g}, and {before:.3g} without it"
    pairs = [
        (new, old)
        for new, old in zip(with_it.last_losses, without.last_losses, strict=True)
        if math.isfinite(old)
    ]
    first = with_it.losses[: len(with_it.last_losses)]
    rises = _apart(with_it.last_losses, first) > 0
    news, olds = mean(with_it.last_losses), mean(without.last_losses)
    losses = f"loss {news:.4g}, and {olds:.4g} without it"
    if symptom is _LOSS:
        lower = not pairs or _apart_paired(pairs) < 0
        if rises:
            return False, f"the loss rises from {mean(first):.4g} to {news:.4g}"
        return lower, losses if lower else f"{losses}, which is no less"
    if (_apart_paired(pairs) > 0) if pairs else rises:
        return False, f"{symptom.what}: {now:.3g}, but {losses}"
    return True, f"{symptom.what}: {now:.3g}, and {before:.3g} without it; {losses}"


def _apart_paired(pairs: Sequence[tuple[float, float]]) -> float:
    """By how much the first ones are above the second ones, beyond noise; negative: below."""
    differences = [new - old for new, old in pairs]
    level = mean([abs(old) for _, old in pairs])
    return _beyond(mean(differences), _error_of_mean(differences), level)


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The same of losses on different batches; 0 where one of them is not finite."""
    other = [loss for loss in other if math.isfinite(loss)]
    if not other:
        return 0.0
    difference = mean(one) - mean(other)
    noise = math.hypot(_error_of_mean(one), _error_of_mean(other))
    return _beyond(difference, noise, abs(mean(other)))


def mean(values: Sequence[float]) -> float:
    """Of infinities too, of which `statistics.fmean` makes an error."""
    return sum(values) / len(values)


def _error_of_mean(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _beyond(difference: float, error_of_mean: float, level: float) -> float:
    noise = max(2.0 * error_of_mean, TOLERANCE * level)
    return math.copysign(max(abs(difference) - noise, 0.0), difference)
