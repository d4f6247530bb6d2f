"""Intervals of a recipe such as `2 epochs`: when something falls due, and how often."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpcli.recipe.base import parse_duration
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan


def step_due(every: str | None, plan: Plan) -> Callable[[int], bool]:
    """Whether an interval such as `2 epochs` ends with a step; one of minutes never does."""
    if every is None:
        return lambda step: False
    number, unit = parse_duration(every)
    if unit == "minute":
        return lambda step: False
    steps = number * (plan.steps_per_epoch if unit == "epoch" else 1)
    return lambda step: step % steps == 0


def timer(every: str | None) -> Callable[[], bool]:
    """Whether an interval such as `2 minutes` has passed since it last had."""
    number, unit = parse_duration(every) if every else (0, None)
    if unit != "minute":
        return lambda: False
    last = time.monotonic()

    def passed() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < 60 * number:
            return False
        last = now
        return True

    return passed


def saves_left(recipe: Recipe, plan: Plan, attempted: int) -> int:
    """How many checkpoints a run saves yet, at most, without those that signals ask for."""
    every = recipe.output.checkpoint_every
    number, unit = parse_duration(every) if every else (0, None)
    if unit == "minute" or recipe.output.keep_best:
        return plan.steps - attempted
    if unit is None:
        return 0
    interval = number * (plan.steps_per_epoch if unit == "epoch" else 1)
    first = recipe.train.on_nonfinite == "rollback" and not attempted
    return (plan.steps - 1) // interval - attempted // interval + 1 + first
