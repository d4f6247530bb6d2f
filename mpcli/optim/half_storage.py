"""Steps of weights and optimizer state that are stored in half precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpcli.precision.formats import HALF
from mpcli.precision.rounding import round_stochastically

CHUNK = 2**22
"""Elements that are widened to fp32 together: 16 MB for the weights, as much for each state."""


class HalfStorageStep:
    """An optimizer's step for weights and state that are stored in half precision.

    The arithmetic of the step is fp32, from the fp32 gradients on: weights and state are widened,
    a chunk at a time, stepped by torch's fused kernel and rounded back once. What half storage
    costs is that rounding: updates below half a unit in the last place are lost, and small second
    moments become zero.

    Args:
        weights: fp16, bf16, or fp32 where a weight belongs to an fp32 island.
        seed: of stochastic rounding of bf16 weights; None rounds to nearest. State always is.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], seed: int | None
    ) -> None:
        self.optimizer = optimizer
        self.weights = weights
        # What is widened stands in for the weight: a parameter whose type changes, if only for a
        # moment, loses its hooks on gradients, by which DistributedDataParallel adds them up.
        stand_ins = {weight: weight.detach() for weight in weights}
        self.stand_ins = list(stand_ins.values())
        for group in optimizer.param_groups:
            group["params"] = [stand_ins[weight] for weight in group["params"]]
        self.seed = seed
        self.offsets = [0]
        self.chunks: list[list[int]] = [[]]
        room = CHUNK
        for index, weight in enumerate(weights):
            self.offsets.append(self.offsets[-1] + weight.numel())
            if weight.numel() > room and self.chunks[-1]:
                self.chunks.append([])
                room = CHUNK
            self.chunks[-1].append(index)
            room -= weight.numel()

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], applied: Tensor) -> None:
        """One step. A weight without a gradient is left alone, as by torch.

        Args:
            gradients: fp32, one per weight.
            applied: int64 of one element, the number of applied steps: stochastic rounding draws
                from it, so a skipped step changes nothing of what follows.
        """
        for chunk in self.chunks:
            stepped = [index for index in chunk if gradients[index] is not None]
            for index in stepped:
                self._widen(index, gradients[index])
            self.optimizer.step()  # skips the weights without a gradient
            for index in stepped:
                self._narrow(index, applied)

    def _widen(self, index: int, gradient: Tensor | None) -> None:
        weight, wide = self.weights[index], self.stand_ins[index]
        wide.data = weight.detach().float()
        wide.grad = gradient
        state = self.optimizer.state[weight]
        self.optimizer.state[wide] = {key: value.float() for key, value in state.items()}

    def _narrow(self, index: int, applied: Tensor) -> None:
        weight, wide = self.weights[index].detach(), self.stand_ins[index]
        if self.seed is not None and weight.dtype in HALF:
            offset = self.offsets[index]
            weight.copy_(round_stochastically(wide.data, self.seed, applied, offset))
        else:
            weight.copy_(wide.data)
        wide_state = self.optimizer.state.pop(wide)
        for key, value in self.optimizer.state[self.weights[index]].items():
            value.copy_(wide_state[key])
        wide.grad = None
        wide.data = weight
