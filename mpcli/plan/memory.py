"""What a rank's memory will hold, found by one step on tensors without memory."""

from __future__ import annotations

from collections.abc import Collection

import torch

from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan
from mpcli.tasks import Dataset


def plan_memory(
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    fp32_modules: Collection[str],
) -> MemoryPlan:
    """Bytes of one rank, by what they are for, and how many there are at once at most.

    Args:
        micro_batch: samples of a forward.
        accumulation: micro-batches of a step.
        fp32_modules: see `convert`.
    """
    raise NotImplementedError
