"""The loss scale as device tensors: every decision without a host read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpcli.precision.loss_scale import floor, initial_state, position_at
from mpcli.recipe.precision import DynamicScale, LossScale, ScheduledScale


class LossScaler:
    """Tensor form of `loss_scale.advance`, equal to it step for step.

    Attributes:
        scale: fp32 scalar tensor on the device, the factor of the next loss. `update` binds a
            new tensor, so a reference taken before it keeps the value that was used.
        attempted: steps so far, a number on the host.
    """

    def __init__(self, policy: LossScale, device: torch.device) -> None:
        self.policy = policy
        state = initial_state(policy)
        self.attempted = state.attempted
        self.scale = torch.tensor(state.scale, dtype=torch.float32, device=device)
        self.good_steps = torch.tensor(state.good_steps, dtype=torch.int32, device=device)
        self.overflows = torch.tensor(state.overflows, dtype=torch.int32, device=device)
        scheduled = [v for _, v in policy.points] if isinstance(policy, ScheduledScale) else []
        self._scheduled = torch.tensor(scheduled, dtype=torch.float32, device=device)
        self._inverse_scale = self._inverse()

    def begin(self, attempted: int) -> None:
        """Begin after `attempted` steps that another policy scaled."""
        self.attempted = attempted
        if isinstance(self.policy, ScheduledScale):
            self.scale = self._scheduled[position_at(self.policy.points, attempted)]
        elif isinstance(self.policy, DynamicScale):
            self.scale = self.scale.clamp_min(floor(self.policy, attempted))
        self._inverse_scale = self._inverse()

    def unscale_(self, gradients: list[Tensor]) -> Tensor:
        """Divide fp32 gradients by the scale in place.

        Returns:
            fp32 scalar tensor: 1 where any element of any gradient is NaN or infinite, else 0.
        """
        found_inf = torch.zeros((), dtype=torch.float32, device=self.scale.device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, self._inverse_scale)
        return found_inf

    def update(self, found_inf: Tensor) -> None:
        """Take the policy's decision after a step. `found_inf`: what `unscale_` returned."""
        self.attempted += 1
        if isinstance(self.policy, ScheduledScale):
            self.scale = self._scheduled[position_at(self.policy.points, self.attempted)]
            self._inverse_scale = self._inverse()
        elif isinstance(self.policy, DynamicScale):
            self._adapt(self.policy, found_inf > 0)
            self._inverse_scale = self._inverse()

    def tensors(self) -> dict[str, Tensor]:
        """What the next decisions follow from, besides `attempted`."""
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}

    def restore(self, tensors: Mapping[str, Tensor], attempted: int) -> None:
        """Go on after `attempted` steps, with what `tensors` returned then."""
        self.attempted = attempted
        device = self.scale.device
        self.scale = tensors["scale"].to(device, copy=True)
        self.good_steps = tensors["good_steps"].to(device, copy=True)
        self.overflows = tensors["overflows"].to(device, copy=True)
        self._inverse_scale = self._inverse()

    def _adapt(self, policy: DynamicScale, overflow: Tensor) -> None:
        overflows = self.overflows + overflow
        good_steps = (self.good_steps + 1) * ~overflow
        back_off = overflows >= policy.hysteresis  # then this step overflowed: it resets to 0
        grow = good_steps >= policy.growth_interval
        # Products in fp64, rounded once: what torch's own kernel and the pure form do.
        scale = self.scale.double()
        lower = scale * policy.backoff_factor
        higher = (scale * policy.growth_factor).clamp_max(policy.max_scale)
        moved = torch.where(back_off, lower, torch.where(grow, higher, scale))
        self.scale = moved.clamp_min(floor(policy, self.attempted)).float()
        self.overflows = overflows * ~(back_off | grow)
        self.good_steps = good_steps * ~grow

    def _inverse(self) -> Tensor:
        return self.scale.double().reciprocal().float()
