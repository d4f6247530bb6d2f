"""Training itself: gradients that explode or vanish, steps that do not repeat, wrong updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mpcli.diagnose import remedies
from mpcli.diagnose.born import born
from mpcli.diagnose.checks.updates import UPDATES
from mpcli.diagnose.course import (
    SPIKE,
    course_of,
    matrices,
    modules,
    over_weight,
    steep_gradients,
)
from mpcli.diagnose.evidence import Evidence, History, Sample
from mpcli.diagnose.finding import Finding, Suggestion
from mpcli.records import LayerRecord, Replay

RISE = 100.0
"""Times the median norm of the steps before: in sound runs of four small models in seven modes the
largest norm was at most 5 times the first one; one batch is no cause for two decades."""
VANISHED = 1e-4
"""RMS of the first layer's gradient over that of the last one's; at least 0.02 in the same runs.
Eight sigmoids give 1e-6 (each has a slope of at most 1/4; Glorot & Bengio 2010)."""
ORDINARY = 2.0
"""Times the median norm that a batch may have: half of the norms are below it."""
CONVENTIONAL_LIMIT = 1.0
"""Of a gradient's norm, where no good step shows one (Pascanu et al. 2013)."""
FLUSHED = 0.5
"""Share of a gradient that is zero in half precision: above it underflow comes first."""
DRIFT = 2.0**-5
"""Relative difference of two losses that is no rounding: 8 times bf16's 2^-8."""


def exploding_gradients(evidence: Evidence) -> Iterator[Finding]:
    """Norms that rise by decades before the loss does, or are steep before any update."""
    history, course = evidence.history, course_of(evidence.history)
    if course is None:
        return
    made = born(evidence)
    is_singular = made is not None and made.is_of_operation and made.origin.value == "nan"
    steep = [] if is_singular else steep_gradients(evidence)  # near a pole they are
    if steep and course.end >= course.start:
        worst = steep[0]
        ratio = over_weight(evidence.samples[0], worst)
        yield _exploding(
            evidence,
            f"the gradient of `{worst.name}` is {ratio:.3g} times as large as the weight itself "
            "before the first update",
            worst.step,
            modules(steep),
            CONVENTIONAL_LIMIT,
            {"gradient_over_weight": ratio, "grad_norm": _at(history.grad_norm, history, worst)},
        )
        return
    risen = _rise(history)
    if risen is None or not course.broke:
        return
    index, usual, step = risen
    spike = np.flatnonzero(history.loss >= SPIKE * course.start)
    step = min([step, *history.step[spike[:1]].tolist()])  # of a norm that was not finite
    norm = float(history.grad_norm[index])
    evidence_of_it: dict[str, float | str | bool | None] = {
        "grad_norm": norm, "usual_grad_norm": usual, "first_skipped_step": _first_bad(history),
    }  # fmt: skip
    yield _exploding(
        evidence,
        f"the gradient's norm rose from {usual:.3g} to {norm:.3g} at step "
        f"{history.step[index]}, and the loss after it from {course.start:.3g} to "
        f"{course.highest:.3g}",
        step,
        modules(_largest_gradients(evidence, step)),
        usual,
        evidence_of_it,
    )


def _exploding(
    evidence: Evidence,
    cause: str,
    step: int,
    layers: tuple[str, ...],
    limit: float,
    numbers: dict[str, float | str | bool | None],
) -> Finding:
    bad = _first_bad(evidence.history)
    if bad is not None:
        cause += "; clipping bounds such norms, but cannot repair the inf or NaN that follow"
    clips = [remedies.clip_norm(evidence, limit)] if limit > 0 else []
    others = [remedies.learning_rate(evidence, 0.1), remedies.warmup(evidence)]
    clipped = evidence.recipe is not None and evidence.recipe.train.clip is not None
    first, *rest = [*others, *clips] if clipped else [*clips, *others]
    return Finding(
        id="exploding-gradients",
        severity="error" if bad is not None else "warning",
        cause=cause,
        layers=layers,
        phase="backward",
        step=step,
        confidence=0.8,
        evidence=numbers,
        suggestion=first,
        alternatives=tuple(rest),
    )


def _rise(history: History) -> tuple[int, float, int] | None:
    """Index of the first step whose norm is `RISE` times the median before, that median, and the
    step after the last one before it whose norm was ordinary: some between may have been skipped.
    """
    good = [i for i in range(len(history)) if 0 < history.grad_norm[i] < math.inf]
    norms = history.grad_norm[good]
    for place in range(1, len(good)):
        usual = float(np.median(norms[max(0, place - 100) : place]))
        if norms[place] >= RISE * usual and norms[place] > norms[0]:
            ordinary = np.flatnonzero(norms[:place] <= ORDINARY * usual)
            return good[place], usual, int(history.step[good[int(ordinary[-1])]]) + 1
    return None


def _first_bad(history: History) -> int | None:
    bad = history.skipped | ~history.finite_loss
    return int(history.step[bad.argmax()]) if bad.any() else None


def _largest_gradients(evidence: Evidence, step: int) -> list[LayerRecord]:
    """Of the sampled step nearest to this one, the largest first."""
    samples = [sample for sample in evidence.samples if matrices(sample, "grad")]
    if not samples:
        return []
    nearest = min(samples, key=lambda sample: abs(sample.step - step))
    return sorted(matrices(nearest, "grad").values(), key=lambda row: -row.rms / row.scale)[:5]


def _at(column: np.typing.NDArray[np.float64], history: History, row: LayerRecord) -> float | None:
    there = np.flatnonzero(history.step == row.step)
    return float(column[there[0]]) if len(there) else None


def vanishing_gradients(evidence: Evidence) -> Iterator[Finding]:
    """Gradients that fall by decades towards the first layer, where the loss hardly falls.

    In fp32 as well: of a run in half precision the fp32 shadow says it, or gradients few of which
    are zero.
    """
    course = course_of(evidence.history)
    if course is None or not course.hardly_falls:
        return
    found = _in_shadow(evidence.replay) if evidence.replay else None
    step = evidence.replay.step if evidence.replay else None
    if found is None:
        found, step = _in_rows(evidence.samples)
    if not found:
        return
    ratios = {name: rms / found[-1][1] for name, rms in found}
    layers = sorted((name for name in ratios if ratios[name] <= VANISHED), key=ratios.__getitem__)
    first, last = found[0][0], found[-1][0]
    yield Finding(
        id="vanishing-gradients",
        severity="warning",
        cause=f"the gradient shrinks on its way back: in `{first}` it is {ratios[first]:.1g} of "
        f"that in `{last}`, in fp32 too, so no loss scale and no other precision helps",
        layers=tuple(layers),
        phase="backward",
        step=step,
        confidence=0.9,
        evidence={
            "first_over_last": ratios[first],
            "last_grad_rms": found[-1][1],
            "in_fp32_shadow": bool(evidence.replay and _in_shadow(evidence.replay)),
            "loss_start": course.start,
            "loss_end": course.end,
        },
        suggestion=Suggestion(
            what="put norm layers or residual connections between the layers, or replace sigmoid "
            "and tanh by ReLU or GELU with an initialisation made for it"
        ),
    )


def _in_shadow(replay: Replay) -> list[tuple[str, float]] | None:
    """RMS of the gradients by module, in fp32; None where the replay does not say it."""
    sizes = {
        row.module: row.fp32_parameter_grad_rms
        for row in replay.modules
        if row.fp32_parameter_grad_rms
    }
    return _falling(list(sizes.items())) if len(sizes) > 2 else None


def _in_rows(samples: tuple[Sample, ...]) -> tuple[list[tuple[str, float]], int | None]:
    for sample in samples:
        rows = matrices(sample, "grad").values()
        if rows and all(row.zeros <= FLUSHED for row in rows):
            found = _falling([(row.module, row.rms / row.scale) for row in rows])
            if found:
                return found, sample.step
    return [], None


def _falling(sizes: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The same if they fall from the last to the first by `VANISHED`, by way of the middle."""
    if len(sizes) < 3:
        return []
    (_, first), (_, middle), (_, last) = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    return sizes if 0 < first < middle < last and first <= VANISHED * last else []


def nondeterminism(evidence: Evidence) -> Iterator[Finding]:
    """A step that gave something else when it was run again from the same state."""
    replay = evidence.replay
    if replay is None:
        return
    if replay.nondeterministic:
        first = replay.nondeterministic[0]
        on_gpu = evidence.plan is not None and evidence.plan.device != "cpu"
        yield Finding(
            id="nondeterminism",
            # Some kernels of GPUs have no deterministic form, and only round differently.
            severity="info" if on_gpu else "warning",
            cause=f"`{first or 'the model'}` gives other bits when the same step is run twice: it "
            "draws from a random generator of its own, or the hardware errs",
            layers=replay.nondeterministic,
            phase="forward",
            step=None,
            confidence=0.7,
            evidence={
                "modules": float(len(replay.nondeterministic)),
                "step_run_twice": replay.step,
            },
            suggestion=Suggestion(
                what="draw random numbers from torch's own generator, which a run seeds and keeps"
            ),
        )
    elif replay.reproduced is False and _is_no_rounding(replay):
        then = replay.recorded_loss
        what = f"was {then:.4g} in the run, and {replay.loss:.4g} when it was run again"
        yield Finding(
            id="nondeterminism",
            severity="warning",
            cause=f"the loss of step {replay.step} {what} from the same weights and batch: "
            "hardware that errs, or random numbers that are not torch's",
            phase="forward",
            step=replay.step,
            confidence=0.6,
            evidence={
                "recorded_loss": replay.recorded_loss,
                "loss_again": replay.loss,
                "steps_run_before": replay.steps_again,
            },
            suggestion=Suggestion(what="run it on another machine; `mptrain env` tells them apart"),
        )


def _is_no_rounding(replay: Replay) -> bool:
    """Whether two losses differ by more than steps that were rounded differently can explain.

    Rounding grows from step to step, so it may explain any finite difference once many steps lie
    between; what was finite and is not, it does not.
    """
    if replay.flight_differs:  # the data or the steps before are others, which the replay says
        return False
    then, now = replay.recorded_loss, replay.loss
    if _is_finite(then) != _is_finite(now):
        return True
    if then is None or not _is_finite(then) or replay.steps_again > 10:
        return False
    return abs(then - now) > DRIFT * max(abs(then), abs(now))


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


TRAINING: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
    exploding_gradients, vanishing_gradients, nondeterminism, *UPDATES,
)  # fmt: skip
