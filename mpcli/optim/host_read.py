"""Optimizers that cannot skip a step by themselves: the host reads whether they are to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HostRead(torch.optim.Optimizer):
    """Steps optimizers together, or none of them, as torch's fused kernels would.

    They know no `found_inf`, and some want the learning rate as a number. So the host waits for
    both together, once in each step.

    Attributes:
        found_inf: fp32, one element on the weights' device; 1: the step is to change nothing.
        state: of each weight, plain tensors that are stepped in place.
        tables: tensors that belong to the state and never change.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], learning_rate: Tensor) -> None:
        super().__init__([weight for _, weight in named], {})
        self.learning_rate = learning_rate
        self.found_inf = torch.zeros_like(learning_rate)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.tables: list[Tensor] = []

    def add(
        self,
        optimizer: torch.optim.Optimizer,
        state: dict[Tensor, dict[str, Tensor]] | None = None,
        tables: Sequence[Tensor] = (),
    ) -> None:
        """Let an optimizer step the weights that it has.

        Args:
            optimizer: with its state made.
            state: tensors of that state, where it has anything else.
        """
        self.optimizers.append(optimizer)
        self.state.update(optimizer.state if state is None else state)
        self.tables += tables

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all, unless `found_inf`."""
        taken = self.found_inf.view(1).logical_not()  # of a fake tensor 1 is read: a step is taken
        taken, learning_rate = torch.cat([taken, self.learning_rate.view(1)]).tolist()
        if not taken:
            return
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = learning_rate
            optimizer.step()
