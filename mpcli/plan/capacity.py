"""Which changes of a recipe make it fit a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan

PlanFor = Callable[[Sequence[str]], MemoryPlan]
"""`--set` values -> memory of the recipe with them.

Raises UserError where that recipe cannot be planned, and UnknownMemory.
"""


@dataclass(frozen=True)
class Change:
    """A change of a recipe, and what it needs with it.

    Attributes:
        what: in words.
        settings: `--set` values.
    """

    what: str
    settings: tuple[str, ...]
    memory: MemoryPlan


def changes(recipe: Recipe, micro_batch: int, plan_for: PlanFor) -> list[Change]:
    """Every single change that needs less memory than the recipe; those to try first come first.

    Args:
        micro_batch: samples of a forward now.
    """
    raise NotImplementedError


def fitting(recipe: Recipe, micro_batch: int, plan_for: PlanFor, capacity: int) -> list[Change]:
    """The smallest changes whose peak is at most `capacity` bytes; empty where nothing fits.

    Args:
        micro_batch: samples of a forward now.
    """
    raise NotImplementedError
