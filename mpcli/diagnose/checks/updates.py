"""What the optimizer does with gradients: updates that are lost, misshapen, too large or small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mpcli.diagnose import remedies
from mpcli.diagnose.course import (
    Course,
    course_of,
    foreign_setting,
    matrices,
    modules,
    momentum,
    movements,
    steep_gradients,
)
from mpcli.diagnose.evidence import Evidence, Sample
from mpcli.diagnose.finding import Finding, Severity, Suggestion
from mpcli.plan.dangers import FP16_SAFE_EPS, FP32_SAFE_EPS
from mpcli.recipe.optim import Adam, AdamW
from mpcli.records import LayerRecord

MOSTLY_LOST = 0.5
"""Share of the elements with a gradient whose stored weight did not change."""
HARMFUL = 0.75
"""The same where the loss hardly falls: of every four, one still moves, and 0.57 was seen in runs
that fp32 does not bring further either."""
DOMINATED = 0.1
"""RMS of Adam's first update over the learning rate. It is |g| / (|g| + eps) for each element, so
at a tenth eps is nine times the gradient."""
BOUND = 10.0
"""Times the learning rate. Adam moves an element by (1 - beta1) / sqrt(1 - beta2) of the rate at
most (Kingma & Ba 2015, section 2.1): 3.2 of it by default."""
LARGE = 0.5
"""Of the weights, that updates move them by: half of what was learnt is gone in a step."""
SOUND = 0.1
"""Of the weights: a large but common first update, see `STEEP`."""
USUAL_RATE = 1e-3
"""Where updates are too small for fp32 to add them, so that nothing can be told of them."""
STILL = 0.01
"""Of the weights, that all updates together may have moved them by if each went the same way."""
HALF = ("fp16", "bf16")
COARSE = {"fp16": 2.0**-10, "bf16": 2.0**-7}
"""From a number to the next one, over the number."""


def lost_updates(evidence: Evidence) -> Iterator[Finding]:
    """Updates that half-precision storage rounds away, of a loss that hardly falls."""
    recipe = evidence.recipe
    if recipe and recipe.precision.stochastic_rounding:  # by chance, and right in the mean
        return
    rows = {sample.step: _stored_in_half(sample) for sample in evidence.samples}
    shares = {step: _share_lost(found) for step, found in rows.items() if found}
    course = course_of(evidence.history)
    if not shares or course is None or np.median(list(shares.values())) < MOSTLY_LOST:
        return
    first = next(step for step, share in shares.items() if share >= MOSTLY_LOST)
    worst = sorted(rows[first], key=lambda row: -(row.lost or 0))
    share, half = float(np.median(list(shares.values()))), worst[0].dtype
    changes = [remedies.masters(evidence)]
    if (rounding := remedies.stochastic_rounding(evidence)) is not None:
        changes.append(rounding)
    yield Finding(
        id="lost-updates",
        severity="warning" if course.hardly_falls and share >= HARMFUL else "info",
        cause=f"{share:.0%} of the updates are smaller than half a step between {half} numbers, so "
        f"the {half} weights stay as they are (most in `{worst[0].module or 'the model'}`)",
        layers=modules(worst),
        phase="update",
        step=first,
        confidence=0.95,
        evidence={
            "share_lost": share,
            "worst_share_lost": worst[0].lost,
            "weights_stored_in": half,
            "loss_start": course.start,
            "loss_end": course.end,
        },
        suggestion=changes[0],
        alternatives=tuple(changes[1:]),
    )


def _stored_in_half(sample: Sample) -> list[LayerRecord]:
    updates = sample.of("update")
    return [row for row in updates if row.dtype in HALF and row.lost is not None]


def _share_lost(rows: list[LayerRecord]) -> float:
    return sum((row.lost or 0) * row.elements for row in rows) / sum(row.elements for row in rows)


class _AdamSettings(NamedTuple):
    eps: float
    betas: tuple[float, float]


def _adam(evidence: Evidence) -> _AdamSettings | None:
    if evidence.recipe:
        optim = evidence.recipe.optim
        return _AdamSettings(optim.eps, optim.betas) if isinstance(optim, Adam | AdamW) else None
    foreign = evidence.foreign
    if foreign is None or "adam" not in foreign.optimizer.lower():
        return None
    eps = foreign_setting(evidence, "optimizer.eps")
    betas = [foreign_setting(evidence, f"optimizer.betas.{number}") for number in (0, 1)]
    known = all(map(math.isfinite, (eps, *betas)))
    return _AdamSettings(eps, (betas[0], betas[1])) if known else None


def adam_eps(evidence: Evidence) -> Iterator[Finding]:
    """An epsilon that is lost in the state's format, or that is all there is to divide by."""
    adam, course = _adam(evidence), course_of(evidence.history)
    if adam is None or course is None:
        return
    yield from _too_small(evidence, adam, course)
    if dominated := _dominated(evidence, adam):
        share, rows, step = dominated
        yield Finding(
            id="adam-eps",
            severity="warning" if course.hardly_falls else "info",
            cause=f"Adam's eps of {adam.eps:g} is larger than the gradients that it stands beside, "
            f"so updates are {share:.1%} of the learning rate (least in `{rows[0].module}`)",
            layers=modules(rows),
            phase="update",
            step=step,
            confidence=0.9,
            evidence={"eps": adam.eps, "update_over_learning_rate": share},
            suggestion=remedies.adam_eps(evidence, 1e-8 if _state(evidence) != "fp16" else 1e-5),
        )


def _too_small(evidence: Evidence, adam: _AdamSettings, course: Course) -> Iterator[Finding]:
    """Second moments that became zero beside first ones that did not: m / (0 + eps).

    Proved by an update that Adam cannot make, or by tensors of zeros in its state; where neither
    was seen, the format says it of a run that broke.
    """
    state = _state(evidence)
    steps, worst = _above_bound(evidence)
    is_unsafe = adam.eps < (FP16_SAFE_EPS if state == "fp16" else FP32_SAFE_EPS)
    zero = _only_second_zero(evidence) if is_unsafe else []
    smallest = 2.0**-25 if state == "fp16" else 2.0**-149
    suspect = state == "fp16" and is_unsafe and (course.broke or _breaks(evidence))
    if not worst and not zero and not suspect and adam.eps != 0:
        return
    if not (worst or zero or suspect) and not (course.broke or _breaks(evidence)):
        return  # an eps of 0 that did no harm
    bad = evidence.history.skipped | ~evidence.history.finite_loss
    first = steps or (int(evidence.history.step[bad.argmax()]) if bad.any() else None)
    numbers: dict[str, float | str | bool | None] = {"eps": adam.eps, "state_stored_in": state}
    if worst:
        numbers["largest_update_over_learning_rate"] = worst[0][0]
    yield Finding(
        id="adam-eps",
        severity=_harm(evidence, course),
        cause=f"second moments of Adam become 0 in {state}, whose smallest number is "
        f"{2 * smallest:.2g}, so updates are divided by eps = {adam.eps:g} alone",
        layers=tuple(dict.fromkeys((*(row.module for _, row in worst), *zero))),
        phase="update",
        step=first,
        confidence=0.95 if worst or zero else 0.7,
        evidence=numbers,
        suggestion=remedies.adam_eps(evidence, 1e-4 if state == "fp16" else 1e-8),
        alternatives=(remedies.masters(evidence),) if state == "fp16" else (),
    )


def _harm(evidence: Evidence, course: Course) -> Severity:
    """Of an update that cannot be meant, by what the loss did."""
    if course.broke or _breaks(evidence):
        return "error"
    return "warning" if course.hardly_falls else "info"


def _breaks(evidence: Evidence) -> bool:
    """Whether the loss of a run ends as NaN or infinity."""
    history = evidence.history
    return bool(len(history)) and not history.finite_loss[-1]


def _state(evidence: Evidence) -> str:
    """The format of the optimizer's state: that of the weights which it steps."""
    if evidence.recipe:
        compute, _, kind = evidence.recipe.precision.mode.partition("-")
        return compute if kind == "pure" else "fp32"
    updates = [row.dtype for sample in evidence.samples for row in sample.of("update")]
    return next((half for half in HALF if half in updates), "fp32")


def _above_bound(evidence: Evidence) -> tuple[int | None, list[tuple[float, LayerRecord]]]:
    """Updates larger than Adam's can be, and the first sampled step with any; the worst first."""
    history = evidence.history
    rates = dict(zip(history.step.tolist(), history.lr.tolist(), strict=True))
    for sample in evidence.samples:
        rate = rates.get(sample.step, 0.0)
        rows = [
            (row.max / rate, row) for row in sample.of("update") if rate and row.max > BOUND * rate
        ]
        # What is stored in half moves by whole steps between its numbers, however small the update.
        coarse = {row.name: row.max * COARSE.get(row.dtype, 0.0) for row in sample.of("weight")}
        rows = [
            (ratio, row)
            for ratio, row in rows
            if row.max > coarse.get(row.name, 0.0) + BOUND * rate
        ]
        if rows:
            return sample.step, sorted(rows, key=lambda found: -found[0])
    return None, []


def _only_second_zero(evidence: Evidence) -> list[str]:
    """Modules with a parameter whose second moments are all zero, and first ones are not."""
    states = evidence.facts.optimizer.states if evidence.facts.optimizer else ()
    zero = {state.key: set(state.zero) for state in states}
    names = zero.get("exp_avg_sq", set()) - zero.get("exp_avg", set())
    return sorted({name.rpartition(".")[0] or name for name in names})


def _dominated(
    evidence: Evidence, adam: _AdamSettings
) -> tuple[float, list[LayerRecord], int] | None:
    """RMS of the first update over the rate where eps holds it down, its rows, and its step.

    Only the first applied step says it: later ones divide by gradients of the past as well.
    """
    history = evidence.history
    applied = history.step[history.applied]
    if not len(applied) or adam.eps == 0:
        return None
    step = int(applied[0])
    sample = next((sample for sample in evidence.samples if sample.step == step), None)
    rate = float(history.lr[history.step == step][0])
    if sample is None or not rate:
        return None
    rows = [
        row
        for row in matrices(sample, "update").values()
        if row.rms and row.zeros < 1 and not (row.dtype in HALF and (row.lost or 0) > MOSTLY_LOST)
    ]
    if not rows:
        return None
    moving = sum(row.elements * (1 - row.zeros) for row in rows)
    size = math.sqrt(sum(row.elements * row.rms**2 for row in rows) / moving)
    share = size / rate
    if share >= DOMINATED:
        return None
    return share, sorted(rows, key=lambda row: row.rms), step


def learning_rate_too_high(evidence: Evidence) -> Iterator[Finding]:
    """Updates as large as the weights, and a loss that ends above where it began."""
    course, history = course_of(evidence.history), evidence.history
    if course is None or not course.broke or steep_gradients(evidence):
        return
    found = oversized(evidence)
    if found is None or (_adam(evidence) and _above_bound(evidence)[1]):
        return
    step, share = found
    factor = min(0.1, SOUND / share)
    yield Finding(
        id="learning-rate",
        severity="error" if course.end == math.inf else "warning",
        cause=f"the learning rate of {float(history.lr.max()):g} is too high, in any precision: "
        f"updates reach {share:.3g} of the weights, and the loss went from {course.start:.3g} "
        f"up to {course.highest:.3g}",
        layers=_most_moved(evidence, step),
        phase="update",
        step=step,
        confidence=0.9,
        evidence={
            "update_over_weight": share,
            "loss_start": course.start,
            "loss_highest": course.highest,
            "loss_end": course.end,
        },
        suggestion=remedies.learning_rate(evidence, factor),
        alternatives=(
            remedies.learning_rate(evidence, factor / 10),
            remedies.warmup(evidence),
            remedies.clip_norm(evidence, _usual_norm(evidence)),
        ),
    )


def oversized(evidence: Evidence) -> tuple[int, float] | None:
    """The first sampled step whose update is too large, and how large, as a share of the weights.

    That of the first step counts at the highest rate that follows, with what momentum makes of it.
    """
    history = evidence.history
    rates = dict(zip(history.step.tolist(), history.lr.tolist(), strict=True))
    for step, share in movements(evidence):
        rate = rates.get(step, 0.0)
        if step == 1 and rate:
            share *= float(history.lr.max()) / rate / (1 - momentum(evidence))
        if share >= LARGE:
            return step, share
    return None


def learning_rate_too_low(evidence: Evidence) -> Iterator[Finding]:
    """Updates that together hardly move the weights, of gradients that are there."""
    course, history = course_of(evidence.history), evidence.history
    if course is None or not course.hardly_falls or course.end > 1.5 * course.start:
        return
    if evidence.recipe and getattr(evidence.recipe.task, "init_from", None):
        return  # what is learnt already wants small updates
    moved = _moved_by_all(evidence)
    if moved is None or moved >= STILL:
        return
    lr = history.lr
    if lr[-1] == lr.max() > lr[0]:  # the warm-up is not over
        return
    if _flushed(evidence) or _lost(evidence) or _no_proof_of_rate(evidence):
        return
    wanted = min(max(2 / course.steps, 1e-3), 0.03) * course.steps  # of the weights
    factor = wanted / moved if moved else USUAL_RATE / float(lr.max())
    yield Finding(
        id="learning-rate",
        severity="warning",
        cause=f"the learning rate of {float(lr.max()):g} is too low, in any precision: "
        f"{course.steps} updates moved the weights by at most {moved:.2%}, "
        f"and the loss stays at {course.end:.3g}",
        layers=(),
        phase="update",
        step=int(history.step[0]),
        confidence=0.8,
        evidence={
            "moved_of_the_weights": moved,
            "loss_start": course.start,
            "loss_end": course.end,
        },
        suggestion=_looser_clip(evidence) or remedies.learning_rate(evidence, factor),
        alternatives=(remedies.learning_rate(evidence, factor / 10),),
    )


def _moved_by_all(evidence: Evidence) -> float | None:
    """All updates together over the weights, if each goes the same way; None if none was sampled.

    What a sampled step moves is taken per learning rate, as most are sampled in a warm-up.
    """
    history = evidence.history
    rates = dict(zip(history.step.tolist(), history.lr.tolist(), strict=True))
    known = [share / rates[step] for step, share in movements(evidence) if rates.get(step)]
    if not known:
        return None
    return float(max(known) * history.lr[history.applied].sum() / (1 - momentum(evidence)))


def _flushed(evidence: Evidence) -> bool:
    """Whether most elements of the gradients are zero: their size is the fault, not the rate's."""
    rows = [row for sample in evidence.samples for row in matrices(sample, "grad").values()]
    elements = sum(row.elements for row in rows)
    return sum(row.zeros * row.elements for row in rows) > MOSTLY_LOST * elements


def _lost(evidence: Evidence) -> bool:
    return any(
        _share_lost(rows) >= MOSTLY_LOST
        for sample in evidence.samples
        if (rows := _stored_in_half(sample))
    )


def _no_proof_of_rate(evidence: Evidence) -> bool:
    """Whether Adam's updates are small for its epsilon."""
    adam = _adam(evidence)
    return adam is not None and _dominated(evidence, adam) is not None


def _looser_clip(evidence: Evidence) -> Suggestion | None:
    """Where clipping leaves less than a hundredth of the usual gradient, it is what to change."""
    clip = evidence.recipe.train.clip if evidence.recipe else None
    usual = _usual_norm(evidence)
    if clip is None or clip.kind != "norm" or clip.max_norm > usual / 100:
        return None
    return remedies.clip_norm(evidence, usual)


def _usual_norm(evidence: Evidence) -> float:
    """Of the gradients, in the first steps; 1 where none is known."""
    norms = evidence.history.grad_norm
    norms = norms[np.isfinite(norms) & (norms > 0)][:10]
    return float(np.median(norms)) if len(norms) else 1.0


def _most_moved(evidence: Evidence, step: int) -> tuple[str, ...]:
    sample = next(sample for sample in evidence.samples if sample.step == step)
    rows = [row for row in matrices(sample, "update").values() if row.update_ratio]
    return modules(sorted(rows, key=lambda row: -(row.update_ratio or 0)))[:5]


UPDATES: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
    lost_updates, adam_eps, learning_rate_too_high, learning_rate_too_low,
)  # fmt: skip
