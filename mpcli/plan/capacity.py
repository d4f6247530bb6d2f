"""Which changes of a recipe make it fit a device's memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import yaml

from mpcli.plan.memory import UnknownMemory
from mpcli.plan.micro_batch import smaller_sizes
from mpcli.precision.numerics import numerics
from mpcli.recipe.dump import written
from mpcli.recipe.engine import DeepSpeed, Engine, Fsdp2
from mpcli.recipe.errors import UserError
from mpcli.recipe.optim import AdamW
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan, Plan
from mpcli.sizes import size_text

PlanFor = Callable[[Sequence[str]], MemoryPlan]
"""`--set` values -> memory of the recipe with them, taken together.

Raises UserError where that recipe cannot be planned, and UnknownMemory.
"""

_Described = tuple[str, tuple[str, ...]]  # a change in words, and its `--set` values

_MICRO_BATCH = "train.micro_batch_size"


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
    if fit := fitting(recipe, plan, plan_for, capacity):
        return Fit(capacity, False, peak, tuple(fit))
    all_of_them = together(recipe, plan, plan_for, capacity)
    if all_of_them and all_of_them.memory.peak <= capacity:
        return Fit(capacity, False, peak, (all_of_them,))
    return Fit(capacity, False, peak, (), all_of_them)


def changes(recipe: Recipe, plan: Plan, plan_for: PlanFor) -> list[Change]:
    """Every change by itself that can be planned, those first that change least.

    Of micro-batches it is the smallest one.
    """
    smallest = map(_micro_batch, smaller_sizes(recipe, plan)[-1:])
    return _planned([*smallest, *_others(recipe)], plan_for)


def changes_text(memory: MemoryPlan, changes: list[Change]) -> str:
    """What changes of a recipe with that memory save of its peak, each of them, in a line."""
    saved = [(memory.peak - change.memory.peak, change.what) for change in changes]
    told = (f"{what}: {size_text(num)} less" for num, what in saved if num > 0)
    return "; ".join(told)


def fitting(recipe: Recipe, plan: Plan, plan_for: PlanFor, capacity: int) -> list[Change]:
    """The changes whose peak is at most `capacity` bytes, those first that change least."""
    largest = _largest_micro_batch(smaller_sizes(recipe, plan), plan_for, capacity)
    others = _planned(_others(recipe), plan_for)
    found = ([largest] if largest else []) + others
    return [change for change in found if change.memory.peak <= capacity]


def together(recipe: Recipe, plan: Plan, plan_for: PlanFor, capacity: int) -> Change | None:
    """Changes added one by one until they fit, less what turns out not to be needed.

    Returns:
        If they never fit, those that need least; None where no change can be planned.
    """
    singles = [(one.what, one.settings) for one in changes(recipe, plan, plan_for)]
    best: Change | None = None
    for path in ("engine.kind", "optim"):  # 8-bit states cannot be divided: either of both
        parts: list[_Described] = []
        now: Change | None = None
        for one in singles:
            if _sets(one, path):
                continue
            for change in _planned([_joined(*parts, one)], plan_for):
                if now is None or change.memory.peak < now.memory.peak:
                    now, parts = change, [*parts, one]
            if now and now.memory.peak <= capacity:
                return _least(now, parts, smaller_sizes(recipe, plan), plan_for, capacity)
        if now and (best is None or now.memory.peak < best.memory.peak):
            best = now
    return best


def _least(
    found: Change,
    parts: Sequence[_Described],
    sizes: Sequence[int],
    plan_for: PlanFor,
    capacity: int,
) -> Change:
    """What of changes that fit together is needed, with the largest micro-batch that fits."""
    needed = list(parts)
    for part in parts[:-1]:  # without the last one they did not fit
        rest = [one for one in needed if one is not part]
        for change in _planned([_joined(*rest)], plan_for):
            if change.memory.peak <= capacity:
                found, needed = change, rest
    others = [one for one in needed if not _sets(one, _MICRO_BATCH)]
    if len(others) == len(needed):
        return found
    return _largest_micro_batch(sizes, plan_for, capacity, *others) or found


def _sets(change: _Described, path: str) -> bool:
    return any(setting.partition("=")[0] == path for setting in change[1])


def _joined(*changes: _Described) -> _Described:
    """All at once; of settings of one path the last one holds."""
    settings: dict[str, str] = {}
    for _, own in changes:
        settings |= {setting.partition("=")[0]: setting for setting in own}
    return "; ".join(what for what, _ in changes), tuple(settings.values())


def _planned(found: Iterable[_Described], plan_for: PlanFor) -> list[Change]:
    """Those that can be planned."""
    planned = []
    for what, settings in found:
        with suppress(UserError, UnknownMemory):
            planned.append(Change(what, settings, plan_for(settings)))
    return planned


def _largest_micro_batch(
    sizes: Sequence[int], plan_for: PlanFor, capacity: int, *others: _Described
) -> Change | None:
    """The first of falling sizes that fits beside other changes, by halving the range."""
    low, high = 0, len(sizes)  # the first that fits is none below `low`
    best: Change | None = None
    while low < high:
        middle = (low + high) // 2
        planned = _planned([_joined(_micro_batch(sizes[middle]), *others)], plan_for)
        if planned and planned[0].memory.peak <= capacity:
            best, high = planned[0], middle
        else:
            low = middle + 1
    return best


def _micro_batch(size: int) -> _Described:
    what = f"compute {size} sample{'s' * (size > 1)} at a time, and add up their gradients"
    return what, (f"{_MICRO_BATCH}={size}",)


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
    if not (isinstance(engine, Fsdp2) and engine.cpu_offload):
        what = "keep weights, gradients and optimizer state in host memory (fsdp2)"
        yield what, _other_engine(engine, Fsdp2, "fsdp2", "cpu_offload")
    if not (isinstance(engine, DeepSpeed) and engine.offload):
        what = "keep optimizer state and fp32 masters in host memory (ZeRO-Offload)"
        yield what, _other_engine(engine, DeepSpeed, "deepspeed", "offload")


def _other_engine(
    engine: Engine, other: type[Fsdp2 | DeepSpeed], kind: str, offload: str
) -> tuple[str, ...]:
    """Another kind of engine, with all that both have; neither of these compiles models."""
    own = type(engine).model_fields
    kept = (
        f"engine.{name}={written(value)}"
        for name in other.model_fields
        if name in own.keys() - {"kind", "compile", offload}
        and (value := getattr(engine, name)) != own[name].default
    )
    return f"engine.kind={kind}", f"engine.{offload}=true", *kept
