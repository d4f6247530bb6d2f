"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from mpcli.precision.formats import HALF
from mpcli.precision.rounding import round_stochastically
from mpcli.recipe.optim import (
    Adafactor,
    Adam,
    AdamW,
    AdamW8bit,
    Constant,
    Cosine,
    Linear,
    Muon,
    OneCycle,
    Optim,
    Schedule,
    Sgd,
)


def learning_rate(schedule: Schedule, peak: float, steps: int, applied: int) -> float:
    """The rate of the step that follows `applied` applied steps, in a run of `steps` steps.

    Warm-up rises linearly to `peak` over the first `warmup * steps` steps (not from zero: a step
    at rate 0 would be wasted); `one-cycle` is `torch.optim.lr_scheduler.OneCycleLR` with
    `pct_start=warmup` and torch's defaults, momentum left alone (Smith & Topin 2018).
    """
    if isinstance(schedule, OneCycle):
        return _one_cycle(schedule.warmup, peak, steps, applied)
    warmup_steps = round(schedule.warmup * steps)
    if applied < warmup_steps:
        return peak * (applied + 1) / (warmup_steps + 1)
    done = (applied - warmup_steps) / max(1, steps - warmup_steps)
    match schedule:
        case Constant():
            return peak
        case Linear():
            return peak * (1.0 - done)
        case Cosine():
            return peak * 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            assert_never(schedule)


def _one_cycle(warmup: float, peak: float, steps: int, applied: int) -> float:
    start, end = peak / 25.0, peak / 25.0 / 1e4
    top = warmup * steps - 1.0  # the step of the peak; may fall between two steps
    last = steps - 1.0
    if applied <= top or last <= top:
        low, share = start, applied / top if top > 0 else 1.0
    else:
        low, share = end, 1.0 - (applied - top) / (last - top)
    return low + (peak - low) * 0.5 * (1.0 - math.cos(math.pi * min(1.0, share)))


def learning_rate_table(optim: Optim, steps: int, device: torch.device) -> Tensor:
    """fp32 [steps]: the rate by number of applied steps, to be read on the device."""
    rates = [learning_rate(optim.schedule, optim.lr, steps, applied) for applied in range(steps)]
    return torch.tensor(rates, dtype=torch.float32, device=device)


def build_optimizer(
    optim: Optim, named: Sequence[tuple[str, Tensor]], learning_rate: Tensor
) -> torch.optim.Optimizer:
    """The optimizer with torch's fused kernel, which reads `lr` and `found_inf` on the device.

    All state is made as zeros here. torch makes SGD's momentum buffer in the first step, with
    `empty_like`, and keeps that garbage when the first step is skipped (seen in 2.14.1).

    Args:
        named: the weights that it steps, with their names in the model. State has their types.
        learning_rate: fp32 scalar tensor on the weights' device, written before each step.
    """
    parameters = [parameter for _, parameter in named]
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in named:
        # Norms, biases and other vectors keep their scale (He et al. 2019, section 3.1); so do
        # tables of biases, as Swin's.
        is_free = parameter.ndim <= 1 or "bias" in name.rpartition(".")[2]
        (free if is_free or not optim.weight_decay else decayed).append(parameter)
    groups = [
        {"params": members, "weight_decay": weight_decay}
        for members, weight_decay in ((decayed, optim.weight_decay), (free, 0.0))
        if members
    ]
    optimizer: torch.optim.Optimizer
    match optim:
        case Sgd():
            optimizer = torch.optim.SGD(
                groups,
                lr=learning_rate,
                momentum=optim.momentum,
                nesterov=optim.nesterov,
                fused=True,
            )
            if optim.momentum:
                for parameter in parameters:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        case Adam():
            optimizer = torch.optim.Adam(
                groups, lr=learning_rate, betas=optim.betas, eps=optim.eps, fused=True
            )
        case AdamW():
            optimizer = torch.optim.AdamW(
                groups, lr=learning_rate, betas=optim.betas, eps=optim.eps, fused=True
            )
        case AdamW8bit() | Adafactor() | Muon():
            raise NotImplementedError
        case _:
            assert_never(optim)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


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
