"""How many processes train, and what each of them has to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcli.machine import Machine
from mpcli.recipe.engine import Local
from mpcli.recipe.errors import Problem
from mpcli.recipe.recipe import Recipe


@dataclass(frozen=True)
class Group:
    """Where processes come from.

    Attributes:
        world_size: of the group in which torchrun or SLURM started this process; None: there is
            none, and processes are still to be started.
        nodes: machines that each start `engine.processes`.
    """

    world_size: int | None = None
    nodes: int = 1


ALONE = Group()


def processes(
    recipe: Recipe, machine: Machine, device: torch.device, group: Group
) -> tuple[int, list[Problem]]:
    """How many train together, and why that cannot be."""
    engine = recipe.engine
    if isinstance(engine, Local):
        return 1, []
    if engine.processes != "auto":
        return engine.processes * group.nodes, []
    visible = max(1, len(machine.cuda_devices)) if device.type == "cuda" else 1
    return group.world_size or visible * group.nodes, []
