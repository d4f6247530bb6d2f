"""Weights, gradients and optimizer state divided among the ranks, block by block."""

from __future__ import annotations

from mpcli.engines.local import LocalEngine
from mpcli.precision.numerics import Numerics


def mode_problems(meaning: Numerics) -> list[str]:
    """Why this engine cannot honour a precision mode; empty where it can."""
    if meaning.half_weights and not meaning.masters:
        return [f"`{meaning.mode}` keeps no fp32 weights, and fully_shard's shards are fp32"]
    return []


class Fsdp2Engine(LocalEngine):
    """The local step on this rank's shards."""
