"""The loss scale's policy as a pure function: no torch, no device, replayable from a log.

The loss is multiplied by S before backward so that small activation gradients stay above fp16's
smallest subnormal, 2^-24, and gradients are divided by S before they are used (Micikevicius et
al., ICLR 2018, section 3.2). `scaler.py` holds the same decisions as device tensors.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass, replace

from mpcli.recipe.precision import DynamicScale, LossScale, Points, ScheduledScale, StaticScale


@dataclass(frozen=True)
class ScaleState:
    """Where a policy stands after some steps.

    Attributes:
        scale: the factor of the next step's loss, an fp32 value.
        good_steps: applied steps in a row since the last growth or overflow.
        overflows: overflowed steps since the last growth or back-off.
        attempted: steps so far, applied or not.
    """

    scale: float
    good_steps: int = 0
    overflows: int = 0
    attempted: int = 0


def initial_state(policy: LossScale) -> ScaleState:
    """The state before step 1."""
    if isinstance(policy, DynamicScale):
        return ScaleState(to_fp32(policy.init_scale))
    if isinstance(policy, StaticScale):
        return ScaleState(to_fp32(policy.scale))
    if isinstance(policy, ScheduledScale):
        return ScaleState(to_fp32(policy.points[0][1]))
    return ScaleState(1.0)


def advance(policy: LossScale, state: ScaleState, overflow: bool) -> ScaleState:
    """The state after a step whose gradients did or did not overflow.

    `dynamic` takes the decisions of `torch.amp.GradScaler` with `hysteresis: 1` and a scale
    between its bounds; a larger hysteresis is that of Megatron-LM's `DynamicGradScaler`, counted
    anew after each growth or back-off. A floor that rises lifts the scale at once, which counts
    as neither. `scheduled` follows the attempted steps; the other kinds never move.
    """
    attempted = state.attempted + 1
    if isinstance(policy, ScheduledScale):
        position = position_at(policy.points, attempted)
        return ScaleState(to_fp32(policy.points[position][1]), attempted=attempted)
    if not isinstance(policy, DynamicScale):
        return replace(state, attempted=attempted)
    scale, good_steps, overflows = _decide(policy, state, overflow)
    lifted = max(scale, floor(policy, attempted))
    return ScaleState(to_fp32(lifted), good_steps, overflows, attempted)


def _decide(policy: DynamicScale, state: ScaleState, overflow: bool) -> tuple[float, int, int]:
    """Scale before its floor, good steps and overflows after a step."""
    if overflow:
        overflows = state.overflows + 1
        if overflows < policy.hysteresis:
            return state.scale, 0, overflows
        return state.scale * policy.backoff_factor, 0, 0
    good_steps = state.good_steps + 1
    if good_steps < policy.growth_interval:
        return state.scale, good_steps, state.overflows
    return min(state.scale * policy.growth_factor, policy.max_scale), 0, 0


def floor(policy: DynamicScale, attempted: int) -> float:
    """The lowest scale of the step that follows `attempted` steps."""
    return policy.floors[position_at(policy.floors, attempted)][1]


def at_floor(policy: LossScale, scale: float, attempted: int) -> bool:
    """Whether a step had the lowest scale that a dynamic policy may give it.

    Args:
        scale: the factor of the step's loss.
        attempted: steps before it.
    """
    return isinstance(policy, DynamicScale) and scale <= to_fp32(floor(policy, attempted))


def position_at(points: Points, attempted: int) -> int:
    """Position of the point that holds after `attempted` steps."""
    return bisect_right(points, attempted, key=lambda point: point[0]) - 1


def to_fp32(value: float) -> float:
    """`value` rounded to the nearest fp32 number, as the scale is stored."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
