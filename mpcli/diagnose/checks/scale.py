"""The loss scale: too low, too high, without a floor that holds, or a storm of skipped steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcli.diagnose import remedies
from mpcli.diagnose.born import Born, born, largest_gradient
from mpcli.diagnose.checks.nonfinite import mending, severity_of
from mpcli.diagnose.checks.silent import lossy
from mpcli.diagnose.course import course_of
from mpcli.diagnose.evidence import Evidence, History
from mpcli.diagnose.finding import Finding, Suggestion
from mpcli.diagnose.remedies import FP16_MAX
from mpcli.precision.loss_scale import at_floor
from mpcli.recipe.precision import DynamicScale
from mpcli.records import LayerRecord, ShadowComparison

LEARNT = 0.01
"""Share of the first loss at which everything is learnt: what is left of gradients is small."""
FLUSHED = 0.1
"""Share of a layer's gradient that may become zero: what flushes is its smallest values, and 10%
of those are nothing beside rounding (the share that weights may lose, too)."""
ERROR = 0.125
"""Relative error of a gradient at which what was lost matters. Sound gradients are off by up to
0.06 (measured in fp16-pure, 20 steps of four small models; 0.01 under autocast), by ReLUs that
rounding opens and closes; by 0.16 and more where the same runs had their scale at 1e-5."""
MOST = 0.5
"""Relative error of a gradient that has lost most of itself."""
RANGE = 2.0**-40
"""A gradient so far below the largest is never in fp16 with it: that goes from 2^-24 to 2^16."""
LAST_BITS = -22
"""A value of fp16 below 2^-22 has at most two bits: it is 1, 2 or 3 times the least number."""
HEADROOM = 2.0
"""Bits below fp16's maximum that a raised scale needs: one to double, one to spare."""
STORM = 0.1
"""Share of skipped steps that is no search for a level: the default policy tries a higher scale
every 2000 steps, and one of ten steps lost costs as much as a slower machine."""
RARE = 0.01
"""Share of steps that a fixed scale may skip: a batch now and then is no reason to change it."""
SETTLED = 20
"""Steps after the search for a level from which a share is told."""


def underflow(evidence: Evidence) -> Iterator[Finding]:
    """Gradients that fp16 makes zero, where the same in fp32 are not."""
    parting = evidence.replay.parting if evidence.replay else None
    if evidence.compute != "fp16" or (parting and parting.phase == "forward"):
        return  # of another forward the gradients are others
    if evidence.replay and evidence.replay.origin:
        return
    course = course_of(evidence.history)
    if course and course.end <= LEARNT * course.start:
        return  # gradients end with the loss
    if any(lossy(evidence)):  # a layer's own arithmetic, which a scale does not mend
        return
    lost = sorted(_lost_beside_fp32(evidence), key=lambda one: (-one.flushed, -one.error))
    if not lost and evidence.replay is None:
        lost = list(_last_bits(evidence))
    if not lost:
        return
    worst, scale = lost[0], lost[0].scale
    largest = largest_gradient(evidence)
    headroom = math.log2(FP16_MAX / (largest * scale)) if largest > 0 else math.inf
    may_rise = headroom >= HEADROOM
    proven = worst.proof == "fp32"
    room = f"the largest times the scale is {headroom:.0f} bits below fp16's limit"
    if not largest:
        room = "a higher scale costs nothing"
    elif not may_rise:
        room = "the largest gradients leave no room for a higher scale"
    said = {
        "fp32": f"{worst.flushed:.0%} of the gradient of `{worst.module}` becomes zero",
        "bits": f"{worst.flushed:.0%} of what is left of the gradient of `{worst.module}` has at "
        "most two bits",
        "zero": "the gradient of every layer is zero",
    }
    yield Finding(
        id="underflow",
        severity="error" if proven and worst.error >= MOST else "warning",
        cause=f"{said[worst.proof]} in fp16 at a loss scale of {number(scale)}; {room}",
        layers=tuple(dict.fromkeys(one.module for one in lost)),
        phase="backward",
        # The scale holds from the beginning, or since it fell.
        step=_since(evidence.history, scale),
        confidence=0.95 if proven else 0.6,
        evidence={
            _SHARE[worst.proof]: worst.flushed,
            "relative error of the gradient": worst.error if proven else None,
            "layers": len({one.module for one in lost}),
            "loss scale": scale,
            "largest gradient without the scale": largest or None,
            "bits below fp16's limit": headroom if math.isfinite(headroom) else None,
        },
        **_first_of(_against_underflow(evidence, lost, largest, may_rise)),
    )


def scale_too_high(evidence: Evidence) -> Iterator[Finding]:
    """Gradients that overflow for the scale's sake, under a policy that does not lower it."""
    history, found = evidence.history, born(evidence)
    if not history.skipped.any():
        return
    stuck = history.skipped & history.finite_loss & (history.scale > 1) & _stays(evidence)
    if not stuck.any() or stuck.mean() <= RARE or (history.skipped & (history.scale <= 1)).any():
        return
    if evidence.replay:
        if found is None or not found.is_of_scale:
            return
    elif found and (found.is_of_operation or found.origin.phase != "backward"):
        return
    first = int(stuck.argmax())
    scale, largest = float(history.scale[first]), largest_gradient(evidence)
    place = f", first in `{found.origin.module}`" if found else ""
    is_lower = largest > 0 and largest * scale > FP16_MAX  # else it is the inside of a module
    fits = [remedies.static_scale(evidence, largest)] if is_lower else []
    layers = (found.origin.module,) if found else _overflowed(evidence)
    yield Finding(
        id="scale-too-high",
        severity=severity_of(evidence),
        cause=f"the loss scale of {number(scale)} makes gradients overflow in backward{place}, and "
        f"does not fall: {int(stuck.sum())} of {len(history)} steps are skipped",
        layers=layers,
        phase="backward",
        step=int(history.step[first]),
        confidence=found.confidence if found and found.is_of_scale else 0.7 if layers else 0.5,
        evidence={
            "loss scale": scale,
            "steps skipped": int(stuck.sum()),
            "largest gradient without the scale": largest or None,
            "largest gradient times the scale": largest * scale or None,
        },
        **_first_of([remedies.dynamic_scale(evidence), *fits, remedies.bf16(evidence)]),
    )


def scale_collapse(evidence: Evidence) -> Iterator[Finding]:
    """A scale that has fallen to 1 and below: what is not finite there is not the scale's doing."""
    history = evidence.history
    low = history.skipped & (history.scale <= 1)
    fell = low.sum() >= 2 and history.scale.max() > 1  # one of them may find the level
    is_chosen = evidence.recipe is not None and _dynamic(evidence) is None
    found = born(evidence)
    if not fell or is_chosen or (found is not None and found.is_of_scale):
        return
    first = int(low.argmax())
    whose = _whose(found)
    yield Finding(
        id="scale-collapse",
        severity=severity_of(evidence),
        cause=f"the loss scale fell to {number(history.scale.min())} and gradients are still not "
        f"finite: {whose}; a higher scale would make it worse",
        layers=(found.origin.module,) if found else (),
        phase=found.origin.phase if found else "backward",
        step=found.step if found else int(history.step[first]),
        confidence=found.confidence if found else 0.8,
        evidence={
            "lowest loss scale": float(history.scale.min()),
            "steps skipped": int(history.skipped.sum()),
            "of the last 20 steps skipped": int(history.skipped[-20:].sum()),
            "also in fp32": found.in_fp32 if found else None,
        },
        **_first_of(mending(evidence, found) if found else [remedies.wider(evidence)]),
    )


def skip_storm(evidence: Evidence) -> Iterator[Finding]:
    """Steps that go on being skipped after a scale has had the time to find its level."""
    history = evidence.history
    if len(history) < SETTLED or not history.skipped.any():
        return
    # The search is over when the scale is first as low as it is half of the time.
    start = int((history.scale <= np.median(history.scale)).argmax())
    later = history.skipped[start:]
    share = float(later.mean())
    if len(later) < SETTLED or share <= STORM:
        return
    first = start + int(later.argmax())
    growths = int((np.diff(history.scale[start:]) > 0).sum())
    why = _why_storm(evidence, growths, int(later.sum()))
    yield Finding(
        id="skip-storm",
        severity=severity_of(evidence) if share < MOST else "error",
        cause=f"{share:.0%} of the steps from {history.step[start]} on are skipped: {why}",
        phase="backward",
        step=int(history.step[first]),
        confidence=0.9,
        evidence={
            "share of steps skipped": share,
            "steps": len(later),
            "growths of the scale": growths,
            "losses not finite": int((~history.finite_loss[start:]).sum()),
        },
        **_first_of(_against_storm(evidence)),
    )


SCALE: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
    underflow, scale_too_high, scale_collapse, skip_storm,
)  # fmt: skip


@dataclass(frozen=True)
class _Lost:
    """What a layer's gradient lost.

    `flushed`: share that is zero here and not in fp32; with `proof` `bits`, share of what is not
    zero that has at most two bits left; with `zero`, share that is zero, of all layers alike.
    """

    module: str
    flushed: float
    error: float
    scale: float
    proof: str


_SHARE = {
    "fp32": "share that becomes zero",
    "bits": "share with two bits or less",
    "zero": "share of zeros",
}


def _lost_beside_fp32(evidence: Evidence) -> Iterator[_Lost]:
    """Layers whose parameters' gradient is off, and it or that of their outputs flushed."""
    if evidence.replay is None:
        for sampled in _shadowed(evidence):
            seen = sampled.shadow
            if seen and seen.flushed >= FLUSHED and seen.error >= ERROR:
                yield _Lost(sampled.module, seen.flushed, seen.error, sampled.scale, "fp32")
        return
    least = largest_gradient(evidence) * RANGE
    for row in evidence.replay.modules:
        own, given = row.parameter_grad, row.grad_output
        if (row.exact_grad_max or 0.0) < least:
            continue  # it vanishes in fp32 as well
        flushed = max(_flushed(own), _flushed(given))
        if own and flushed >= FLUSHED and math.isfinite(own.error) and own.error >= ERROR:
            yield _Lost(row.module, flushed, own.error, evidence.replay.scale, "fp32")


def _flushed(seen: ShadowComparison | None) -> float:
    return seen.flushed if seen else 0.0


def _shadowed(evidence: Evidence) -> list[LayerRecord]:
    """Gradients of the newest sample that has shadows of some."""
    for sample in reversed(evidence.samples):
        if rows := [row for row in sample.of("grad") if row.shadow]:
            return rows
    return []


def _last_bits(evidence: Evidence) -> Iterator[_Lost]:
    """Layers, the gradient of whose output is mostly fp16's smallest numbers: without a shadow
    nobody knows what was below, but much cannot have been far above.
    """
    if not evidence.samples:
        return
    newest = evidence.samples[-1]
    grads = newest.of("grad")
    if grads and all(row.max == 0 and not row.nan for row in grads):
        for row in reversed(newest.of("grad")):
            yield _Lost(row.module, 1.0, math.nan, row.scale, "zero")
        return
    for row in newest.of("grad_output"):
        present = sum(row.exponents)
        if row.dtype != "fp16" or row.nan or row.inf or not present:
            continue
        lowest = row.lowest_exponent or 0
        few_bits = sum(row.exponents[: max(LAST_BITS - lowest, 0)])
        if 2 * few_bits >= present:
            yield _Lost(row.module, few_bits / present, math.nan, row.scale, "bits")


def _against_underflow(
    evidence: Evidence, lost: list[_Lost], largest: float, may_rise: bool
) -> Iterator[Suggestion | None]:
    if may_rise:
        yield remedies.dynamic_scale(evidence)
        if largest > 0:
            yield remedies.static_scale(evidence, largest)
        yield remedies.bf16(evidence)
    else:
        yield remedies.bf16(evidence)
        yield remedies.fp32_layers(evidence, tuple(one.module for one in lost if one.module))


def _against_storm(evidence: Evidence) -> Iterator[Suggestion | None]:
    if evidence.scales_loss and evidence.history.finite_loss[evidence.history.skipped].any():
        yield remedies.dynamic_scale(evidence)
    yield remedies.wider(evidence)


def _since(history: History, scale: float) -> int | None:
    """The step from which on the scale was no higher than it is."""
    higher = np.flatnonzero(history.scale > scale)
    position = int(higher[-1]) + 1 if len(higher) else 0
    return int(history.step[position]) if position < len(history) else None


def _stays(evidence: Evidence) -> NDArray[np.bool_]:
    """Of each step, whether the scale of the next one is no lower, or as low as it may be."""
    history, policy = evidence.history, _dynamic(evidence)
    stays = np.ones(len(history), np.bool_)
    if evidence.recipe and policy is None:
        return stays
    if evidence.recipe and not history.applied.any():
        return stays  # it was too high for the whole run
    stays[:-1] = history.scale[1:] >= history.scale[:-1]
    stays[-1:] = (stays & history.skipped)[:-1].any()  # what comes next is not known
    if policy:
        steps = zip(history.step, history.scale, strict=True)
        stays |= np.array([at_floor(policy, float(s), int(n) - 1) for n, s in steps], np.bool_)
    return stays


def _dynamic(evidence: Evidence) -> DynamicScale | None:
    policy = evidence.recipe.precision.loss_scale if evidence.recipe else None
    return policy if isinstance(policy, DynamicScale) else None


def _overflowed(evidence: Evidence) -> tuple[str, ...]:
    """Modules whose sampled gradients were infinite, the last of the model first."""
    rows = [row for sample in evidence.samples for row in sample.of("grad_output") if row.inf]
    return tuple(dict.fromkeys(row.module for row in rows))[:1]


def _whose(found: Born | None) -> str:
    if found is None:
        return "the scale is not what makes them so"
    place = f"`{found.origin.module}`" if found.origin.module else "the model's own forward"
    if found.is_of_operation:
        return f"{place} makes {found.origin.value} in {found.origin.phase}, whatever the precision"
    return f"{place} makes {found.origin.value} in {found.origin.phase}, at any scale"


def _why_storm(evidence: Evidence, growths: int, skips: int) -> str:
    history = evidence.history
    if not history.finite_loss[history.skipped].any():
        return "the loss itself is not finite in them, so the trouble begins in forward"
    if growths >= skips / 2:
        return f"the scale grew {growths} times, and overflowed as often"
    if (history.scale.min() == history.scale.max()) and history.scale.max() > 1:
        return f"the scale stays at {number(history.scale.max())}"
    return "their gradients are not finite"


def number(scale: float) -> str:
    """A loss scale in words: mostly a power of two."""
    return f"{scale:,.0f}" if scale >= 1 else f"{scale:.3g}"


def _first_of(suggestions: Iterable[Suggestion | None]) -> dict[str, Any]:
    """Fields of a finding."""
    given = [one for one in suggestions if one is not None]
    return {"suggestion": given[0] if given else None, "alternatives": tuple(given[1:])}
