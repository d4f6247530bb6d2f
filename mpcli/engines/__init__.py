"""Engines: the classes that execute a step.

fsdp2 is imported where a recipe needs it: torch's part of it takes over a second.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import assert_never

import torch
from torch import nn

from mpcli.engines import ddp, deepspeed, local
from mpcli.engines.base import Engine
from mpcli.optim import held_state_bytes
from mpcli.precision.numerics import Numerics
from mpcli.ranks import Ranks
from mpcli.recipe import engine as sections
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.train import Clip

logger = logging.getLogger(__name__)


def mode_problems(engine: sections.Engine, meaning: Numerics) -> list[str]:
    """Why an engine cannot honour a precision mode; empty where it can."""
    match engine:
        case sections.Local():
            return local.mode_problems(meaning)
        case sections.Ddp():
            return ddp.mode_problems(meaning)
        case sections.Fsdp2():
            from mpcli.engines import fsdp2

            return fsdp2.mode_problems(meaning)
        case sections.DeepSpeed():
            return deepspeed.mode_problems(meaning)
        case _:
            assert_never(engine)


def clip_problems(engine: sections.Engine, clip: Clip | None) -> list[str]:
    """Why an engine cannot clip as a recipe says; empty where it can."""
    match engine:
        case sections.Local() | sections.Ddp():
            return []
        case sections.Fsdp2():
            from mpcli.engines import fsdp2

            return fsdp2.clip_problems(clip)
        case sections.DeepSpeed():
            return deepspeed.clip_problems(clip)
        case _:
            assert_never(engine)


def build_engine(
    recipe: Recipe,
    model: nn.Module,
    device: torch.device,
    steps: int,
    fp32_modules: Collection[str],
    ranks: Ranks,
) -> Engine:
    """The engine that a recipe names, which takes the model over; all ranks call it.

    Args:
        model: fp32, on the device, the same in every rank.
        steps: of the run.
        fp32_modules: see `convert`.
    """
    kind: type[local.LocalEngine]
    match recipe.engine:
        case sections.Local():
            kind = local.LocalEngine
        case sections.Ddp():
            kind = ddp.DdpEngine
        case sections.Fsdp2():
            from mpcli.engines import fsdp2

            kind = fsdp2.Fsdp2Engine
        case sections.DeepSpeed():
            kind = deepspeed.DeepSpeedEngine
        case _:
            assert_never(recipe.engine)
    engine = kind(recipe, model, device, steps, fp32_modules, ranks)
    # Said here: what only plans memory, or repeats a step, makes engines too.
    logger.info("optimizer state: %d bytes", held_state_bytes(engine.optimizer))
    return engine
