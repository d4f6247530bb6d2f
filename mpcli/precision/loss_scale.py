"""The loss scale's policy as a pure function: no torch, no device, replayable from a log.

The loss is multiplied by S before backward so that small activation gradients stay above fp16's
smallest subnormal, 2^-24, and gradients are divided by S before they are used (Micikevicius et
al., ICLR 2018, section 3.2). `scaler.py` holds the same decisions as device tensors.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mpcli.recipe.precision import DynamicScale, LossScale, StaticScale


@dataclass(frozen=True)
class ScaleState:
    """Where a policy stands after some steps.

    Attributes:
        scale: the factor of the next step's loss, an fp32 value.
        good_steps: applied steps in a row since the last growth or overflow.
        overflows: overflowed steps since the last growth or back-off.
    """

    scale: float
    good_steps: int = 0
    overflows: int = 0


def initial_state(policy: LossScale) -> ScaleState:
    """The state before step 1."""
    if isinstance(policy, DynamicScale):
        return ScaleState(to_fp32(policy.init_scale))
    if isinstance(policy, StaticScale):
        return ScaleState(to_fp32(policy.scale))
    return ScaleState(1.0)


def advance(policy: LossScale, state: ScaleState, overflow: bool) -> ScaleState:
    """The state after a step whose gradients did or did not overflow.

    Only `dynamic` moves. With `hysteresis: 1` and a scale between its bounds, the decisions are
    those of `torch.amp.GradScaler`; a larger hysteresis is that of Megatron-LM's
    `DynamicGradScaler`, counted anew after each growth or back-off.
    """
    if not isinstance(policy, DynamicScale):
        return state
    if overflow:
        overflows = state.overflows + 1
        if overflows < policy.hysteresis:
            return ScaleState(state.scale, 0, overflows)
        return ScaleState(to_fp32(max(state.scale * policy.backoff_factor, policy.min_scale)))
    good_steps = state.good_steps + 1
    if good_steps < policy.growth_interval:
        return ScaleState(state.scale, good_steps, state.overflows)
    return ScaleState(to_fp32(min(state.scale * policy.growth_factor, policy.max_scale)))


def to_fp32(value: float) -> float:
    """`value` rounded to the nearest fp32 number, as the scale is stored."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
