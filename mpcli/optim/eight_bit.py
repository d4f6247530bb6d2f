"""AdamW whose moments are 8-bit codes: a table's entry times the largest of its block.

Dettmers, Lewis, Shleifer, Zettlemoyer, *8-bit Optimizers via Block-wise Quantization* (2022). Two
packages step it; both are imported when they are asked for, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mpcli.recipe.optim import AdamW8bit

BLOCK = 256
"""Consecutive elements that share a scale."""

Groups = list[dict[str, Any]]
State = dict[Tensor, dict[str, Tensor]]


def has_8bit_state(optim: AdamW8bit, apart: Collection[str], name: str, weight: Tensor) -> bool:
    """Whether the moments of a weight are stored in 8 bits.

    Args:
        apart: names of embeddings.
    """
    if optim.implementation == "torchao" and weight.numel() % BLOCK:
        return False  # it has no last block of its own size
    return weight.numel() >= optim.min_8bit_size and name not in apart


def bitsandbytes_adamw(
    optim: AdamW8bit, groups: Groups, learning_rate: Tensor
) -> tuple[torch.optim.Optimizer, State, list[Tensor]]:
    """bitsandbytes' AdamW, its state and the tables of its codes, which all weights share."""
    from bitsandbytes.optim import AdamW8bit as Theirs

    class AdamW(Theirs):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            """A step of each weight; theirs waits for the GPU after each."""
            for number, group in enumerate(self.param_groups):
                for place, weight in enumerate(group["params"]):
                    if weight.grad is not None:
                        self.update_step(group, weight, number, place)

    _lie_in_order(groups)
    optimizer = AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, min_8bit_size=1)
    state: State = {}
    tables: dict[str, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, weight in enumerate(group["params"]):
            optimizer.init_state(group, weight, number, place)
            theirs = optimizer.state[weight]
            # A number there, on which nothing but this arithmetic of the host's hangs.
            theirs["step"] = torch.zeros((), dtype=torch.int64)
            tables |= {key: theirs[key] for key in ("qmap1", "qmap2")}
            state[weight] = {k: value for k, value in theirs.items() if k not in tables}
    return optimizer, state, list(tables.values())


def torchao_adamw(
    optim: AdamW8bit, groups: Groups, learning_rate: Tensor
) -> tuple[torch.optim.Optimizer, State, list[Tensor]]:
    """torchao's AdamW, the tensors of its state, and the tables of codes of each weight."""
    from torchao.optim import AdamW8bit as Theirs
    from torchao.optim.subclass_8bit import OptimState8bit

    _lie_in_order(groups)
    optimizer = Theirs(groups, lr=learning_rate, betas=optim.betas, eps=optim.eps)
    state: State = {}
    tables: list[Tensor] = []
    for group in optimizer.param_groups:
        for weight in group["params"]:
            step = torch.zeros((), dtype=torch.float32)
            shape, device, dtype = weight.shape, weight.device, weight.dtype
            # Of 4,096 elements and more it would make these itself, in the first step.
            mean = OptimState8bit.zeros(shape, True, BLOCK, device, dtype)
            variance = OptimState8bit.zeros(shape, False, BLOCK, device, dtype)
            optimizer.state[weight] = {"step": step, "exp_avg": mean, "exp_avg_sq": variance}
            tables += [mean.qmap, variance.qmap]
            state[weight] = {
                "step": step,
                "exp_avg_codes": mean.codes,
                "exp_avg_scale": mean.scale,
                "exp_avg_sq_codes": variance.codes,
                "exp_avg_sq_scale": variance.scale,
            }
    return optimizer, state, tables


def _lie_in_order(groups: Groups) -> None:
    """Both packages take the elements of a weight in the order of its dimensions."""
    for group in groups:
        for weight in group["params"]:
            weight.data = weight.data.contiguous()
