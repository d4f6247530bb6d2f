"""The step's first NaN or infinity that a lower loss scale does not mend, and who else has it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mpcli.diagnose.evidence import Evidence, History
from mpcli.diagnose.remedies import FP16_MAX
from mpcli.precision.loss_scale import at_floor
from mpcli.recipe.precision import DynamicScale
from mpcli.records import FlightRecord, LayerRecord, NonFiniteOrigin, Replay

SINGULAR = re.compile(
    r"sqrt|log(?!sumexp|ical)|div|reciprocal|pow|norm(?!al)|acos|asin|atanh|acosh"
)
"""Operations that make infinity of ordinary numbers: at 0, or at the end of their domain."""

AMPLIFIED = 2.0**6
"""Gradients inside a module that overflow while all that pass between modules, times the scale, are
so many times below the limit, are the module's matter and not the scale's."""


@dataclass(frozen=True)
class Born:
    """Where a NaN or an infinity was made.

    Attributes:
        step: at which the steps in a row began to be not finite to which this one belongs.
        scale: of the loss.
        in_fp32: whether fp32 makes it too; None where that was not tried.
        at_scale_1: whether the run's precision makes it without a loss scale too; None likewise.
        confidence: that this is the place.
        may_fall: whether a dynamic policy is about to try a lower scale.
        is_amplified: whether all gradients between modules are far from overflow at that scale.
    """

    origin: NonFiniteOrigin
    step: int
    scale: float
    in_fp32: bool | None
    at_scale_1: bool | None
    confidence: float
    may_fall: bool = False
    is_amplified: bool = False

    @property
    def is_of_operation(self) -> bool:
        """Whether it is what an operation was asked for, rather than what a format cannot hold.

        Without a shadow: NaN out of finite numbers in one operation is no overflow, which makes
        infinity; and infinity of an operation with a pole may be either.
        """
        if self.in_fp32 is not None or self.origin.operation is None:
            return bool(self.in_fp32)
        return self.origin.value == "nan" or self.has_pole

    @property
    def has_pole(self) -> bool:
        """Whether the operation makes infinity of ordinary numbers."""
        return has_pole(self.origin)

    @property
    def is_of_scale(self) -> bool:
        """Whether the loss scale alone made it."""
        is_scaled = self.origin.phase == "backward" and self.at_scale_1 is False
        return is_scaled and (self.may_fall or not self.is_amplified)


def born(evidence: Evidence) -> Born | None:
    """Of the step that was run again; else what a recorder found on the spot; else of its rows.

    Where fp32 makes one too, that one is told, since no precision mends it.
    """
    if evidence.replay is not None:
        return _replayed(evidence, evidence.replay)
    for flight in evidence.facts.run.flights if evidence.facts.run else ():
        if flight.origin is not None and (found := _seen_on_the_spot(evidence, flight)):
            return found
    return _sampled(evidence)


def _replayed(evidence: Evidence, replay: Replay) -> Born | None:
    exact = replay.shadow_origins.get("fp32")
    origin = exact or replay.origin
    if origin is None:
        return None
    unscaled = exact or replay.scale == 1 or replay.shadow_origins.get("unscaled")
    policy = evidence.recipe.precision.loss_scale if evidence.recipe else None
    floor = at_floor(policy, replay.scale, replay.step - 1) if policy else False
    largest = largest_gradient(evidence)
    return Born(
        origin=origin,
        step=began(evidence.history, replay.step),
        scale=replay.scale,
        in_fp32=exact is not None,
        at_scale_1=bool(unscaled),
        confidence=0.8 if replay.reproduced is False else 1.0,
        may_fall=isinstance(policy, DynamicScale) and not floor,
        is_amplified=0 < largest * replay.scale * AMPLIFIED < FP16_MAX,
    )


def largest_gradient(evidence: Evidence) -> float:
    """Without the scale, of all modules: in fp32 where it was run again, else as it was sampled."""
    if evidence.replay:
        sizes = [row.exact_grad_max or 0.0 for row in evidence.replay.modules]
    else:
        sizes = [
            row.max / row.scale
            for sample in evidence.samples
            for row in (*sample.of("grad_output"), *sample.of("grad"))
            if row.scale > 0
        ]
    return max(filter(math.isfinite, sizes), default=0.0)


def _seen_on_the_spot(evidence: Evidence, flight: FlightRecord) -> Born | None:
    """None for what a dynamic scale is there for: gradients that overflowed once, at that scale."""
    assert flight.origin is not None
    is_at_scale_1 = at_scale_1(evidence.history, flight)
    found = Born(
        origin=flight.origin,
        step=flight.step,
        scale=flight.scale,
        in_fp32=None if evidence.compute == "fp16" else True,
        at_scale_1=True if is_at_scale_1 else None,
        confidence=0.8,
    )
    is_of_backward = flight.origin.phase == "backward"
    may_be_scale = is_of_backward and flight.origin.value == "inf" and math.isfinite(flight.loss)
    return None if may_be_scale and not is_at_scale_1 else found


def has_pole(origin: NonFiniteOrigin) -> bool:
    """Whether an operation makes infinity of ordinary numbers."""
    return SINGULAR.search((origin.operation or "").lower()) is not None


def at_scale_1(history: History, flight: FlightRecord) -> bool:
    """Whether a step has no loss scale, or no step from it on is applied until the scale is 1."""
    if flight.scale <= 1:
        return True
    later = history.step >= flight.step
    applied, low = history.applied & later, (history.scale <= 1) & later
    return bool(low.any()) and not applied[: int(low.argmax())].any()


def _sampled(evidence: Evidence) -> Born | None:
    """The first output of a sampled step that is not finite; gradients say nothing of a scale."""
    for sample in evidence.samples:
        spoilt = {row.module for row in sample.of("weight") if row.nan or row.inf}
        for row in sample.of("output"):
            if (row.nan or row.inf) and row.module not in spoilt:
                value = "nan" if row.nan else "inf"
                return Born(
                    origin=NonFiniteOrigin(
                        module=row.module, phase="forward", value=value, call=row.call
                    ),
                    step=sample.step,
                    scale=_scale_at(evidence.history, sample.step),
                    in_fp32=_in_fp32(evidence, row),
                    at_scale_1=None,
                    confidence=0.5,
                )
        if spoilt:
            return None
    return None


def _in_fp32(evidence: Evidence, row: LayerRecord) -> bool | None:
    """bf16 has the range of fp32."""
    if evidence.compute != "fp16":
        return True
    return row.shadow.overflowed == 0 if row.shadow else None


def _scale_at(history: History, step: int) -> float:
    known = history.scale[history.step == step]
    return float(known[0]) if len(known) else 1.0


def began(history: History, step: int) -> int:
    """The first of the steps in a row, up to this one, that were not finite."""
    bad = {int(n) for n in history.step[history.skipped | ~history.finite_loss]}
    while step - 1 in bad:
        step -= 1
    return step
