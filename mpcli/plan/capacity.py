"""Which changes of a recipe make it fit a device's memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import yaml

from mpcli.plan.memory import UnknownMemory
from mpcli.precision.numerics import numerics
from mpcli.recipe.dump import written
from mpcli.recipe.engine import DeepSpeed, Fsdp2
from mpcli.recipe.errors import UserError
from mpcli.recipe.optim import AdamW
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan, Plan

PlanFor = Callable[[Sequence[str]], MemoryPlan]
"""`--set` values -> memory of the recipe with them, taken together.

Raises UserError where that recipe cannot be planned, and UnknownMemory.
"""

_Described = tuple[str, tuple[str, ...]]  # a change in words, and its `--set` values


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


@dataclass(frozen=True)
class Fit:
    """Whether a recipe fits a device, and what would make it fit.

    Attributes:
        fits: None where its memory is not known.
        peak: bytes of the recipe as it is.
        changes: those that make it fit, one of them each time.
        least: where there are none, the changes that together need least.
    """

    capacity: int
    fits: bool | None
    peak: int | None
    changes: tuple[Change, ...] = ()
    least: Change | None = None


def answer(recipe: Recipe, plan: Plan, plan_for: PlanFor, capacity: int) -> Fit:
    """Whether a planned recipe fits `capacity` bytes, and the smallest changes that make it fit."""
    if plan.memory is None:
        return Fit(capacity, None, None)
    peak = plan.memory.peak
    if peak <= capacity:
        return Fit(capacity, True, peak)
    if fit := fitting(recipe, plan.micro_batch_size, plan_for, capacity):
        return Fit(capacity, False, peak, tuple(fit))
    all_of_them = together(recipe, plan.micro_batch_size, plan_for, capacity)
    if all_of_them and all_of_them.memory.peak <= capacity:
        return Fit(capacity, False, peak, (all_of_them,))
    return Fit(capacity, False, peak, (), all_of_them)


def changes(recipe: Recipe, micro_batch: int, plan_for: PlanFor) -> list[Change]:
    """Every change by itself that can be planned, those first that change least.

    Of micro-batches it is the smallest one.

    Args:
        micro_batch: samples of a forward now.
    """
    smallest = [_micro_batch(1)] if micro_batch > 1 else []
    return _planned([*smallest, *_others(recipe)], plan_for)


def fitting(recipe: Recipe, micro_batch: int, plan_for: PlanFor, capacity: int) -> list[Change]:
    """The changes whose peak is at most `capacity` bytes, those first that change least.

    Args:
        micro_batch: samples of a forward now.
    """
    largest = _largest_micro_batch(micro_batch, plan_for, capacity)
    others = _planned(_others(recipe), plan_for)
    found = ([largest] if largest else []) + others
    return [change for change in found if change.memory.peak <= capacity]


def together(recipe: Recipe, micro_batch: int, plan_for: PlanFor, capacity: int) -> Change | None:
    """Changes added one by one until they fit; if they never do, those that need least.

    Args:
        micro_batch: samples of a forward now.

    Returns:
        None where no change can be planned.
    """
    singles = changes(recipe, micro_batch, plan_for)
    # 8-bit states cannot be divided or offloaded: either of both.
    orders = [[one for one in singles if not _is_of(one, kind)] for kind in ("engine", "optim")]
    best: Change | None = None
    for order in orders:
        now: Change | None = None
        for one in order:
            what = f"{now.what}; {one.what}" if now else one.what
            settings = _joined(now.settings if now else (), one.settings)
            for change in _planned([(what, settings)], plan_for):
                if now is None or change.memory.peak < now.memory.peak:
                    now = change
            if now and now.memory.peak <= capacity:
                return now
        if now and (best is None or now.memory.peak < best.memory.peak):
            best = now
    return best


def _is_of(change: Change, section: str) -> bool:
    return any(
        setting.startswith((f"{section}=", f"{section}.kind=")) for setting in change.settings
    )


def _joined(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
    """Settings that hold together: a later one of the same path wins."""
    paths = {setting.partition("=")[0] for setting in after}
    return (*(s for s in before if s.partition("=")[0] not in paths), *after)


def _planned(found: Iterable[_Described], plan_for: PlanFor) -> list[Change]:
    """Those that can be planned."""
    planned = []
    for what, settings in found:
        with suppress(UserError, UnknownMemory):
            planned.append(Change(what, settings, plan_for(settings)))
    return planned


def _largest_micro_batch(micro_batch: int, plan_for: PlanFor, capacity: int) -> Change | None:
    """The largest power of two below the size of now that fits, by halving the range."""
    low, high = 0, (micro_batch - 1).bit_length()  # of the exponents, `high` is too large
    best: Change | None = None
    while low < high:
        middle = (low + high) // 2
        planned = _planned([_micro_batch(2**middle)], plan_for)
        if planned and planned[0].memory.peak <= capacity:
            best, low = planned[0], middle + 1
        else:
            high = middle
    return best


def _micro_batch(size: int) -> _Described:
    what = f"compute {size} sample{'s' * (size > 1)} at a time, and add up their gradients"
    return what, (f"train.micro_batch_size={size}",)


def _others(recipe: Recipe) -> Iterator[_Described]:
    engine, optim = recipe.engine, recipe.optim
    if not engine.activation_checkpointing:
        what = "compute activations again in backward, at a third more time"
        yield what, ("engine.activation_checkpointing=true",)
    if isinstance(optim, AdamW):
        values = optim.model_dump(mode="json") | {"kind": "adamw8bit"}
        flow = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=sys.maxsize)
        yield "store the optimizer's state in 8 bits", (f"optim={flow.strip()}",)
    if not numerics(recipe.precision.mode).half_weights:
        what = "store weights and activations in bf16, beside fp32 masters"
        yield what, ("precision.mode=bf16-master",)
    kept = tuple(
        f"engine.{name}={written(value)}"
        for name in ("device", "activation_checkpointing", "data_workers")
        if (value := getattr(engine, name)) != type(engine).model_fields[name].default
    )
    if not (isinstance(engine, Fsdp2) and engine.cpu_offload):
        what = "keep weights, gradients and optimizer state in host memory (fsdp2)"
        yield what, ("engine.kind=fsdp2", "engine.cpu_offload=true", *kept)
    if not (isinstance(engine, DeepSpeed) and engine.offload):
        what = "keep optimizer state and fp32 masters in host memory (ZeRO-Offload)"
        yield what, ("engine.kind=deepspeed", "engine.offload=true", *kept)
