"""Which changes of a recipe make it fit a device's memory."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import get_args

import yaml
from pydantic import BaseModel

from mpcli.plan.memory import UnknownMemory
from mpcli.plan.micro_batch import halved
from mpcli.precision.numerics import numerics
from mpcli.recipe.engine import DeepSpeed, Fsdp2
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.optim import Adafactor, AdamW, AdamW8bit, Muon
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan, Plan
from mpcli.sizes import size_text

PlanFor = Callable[[tuple[str, ...]], MemoryPlan]
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
        least: where there are none, the changes that together need least, if any need less.
        lacking: packages without which some changes could not be looked at, in words.
    """

    capacity: int
    fits: bool | None
    peak: int | None
    changes: tuple[Change, ...] = ()
    least: Change | None = None
    lacking: tuple[str, ...] = ()


def answer(recipe: Recipe, plan: Plan, plan_for: PlanFor, capacity: int) -> Fit:
    """Whether a planned recipe fits `capacity` bytes, and the smallest changes that make it fit."""
    if plan.memory is None:
        return Fit(capacity, None, None)
    peak = plan.memory.peak
    if peak <= capacity:
        return Fit(capacity, True, peak)
    lacking: dict[str, None] = {}

    @functools.cache
    def remembered(settings: tuple[str, ...]) -> MemoryPlan:
        try:
            return plan_for(settings)
        except UserError as error:
            if error.exit_code is Exit.ENVIRONMENT:
                lacking.update({f"{p.what}: {p.hint}": None for p in error.problems if p.hint})
            raise

    found, least = tuple(fitting(recipe, plan, remembered, capacity)), None
    if not found:
        least = together(recipe, plan, remembered, capacity)
    if least and least.memory.peak <= capacity:
        found, least = (least,), None
    return Fit(capacity, False, peak, found, least, tuple(lacking))


def changes(recipe: Recipe, plan: Plan, plan_for: PlanFor) -> list[Change]:
    """Every change by itself that can be planned, those first that change least.

    Of micro-batches it is the smallest one.
    """
    return _planned([*_micro_batches(recipe, plan)[-1:], *_others(recipe)], plan_for)


def changes_text(memory: MemoryPlan, changes: list[Change]) -> str:
    """Changes of the recipe that need less, and what each of them saves of the peak."""
    saved = [(memory.peak - change.memory.peak, change.what) for change in changes]
    told = (f"{what}: {size_text(num)} less" for num, what in saved if num > 0)
    return "; ".join(told)


def fitting(recipe: Recipe, plan: Plan, plan_for: PlanFor, capacity: int) -> list[Change]:
    """The changes whose peak is at most `capacity` bytes, those first that change least."""
    largest = _first_that_fits(_micro_batches(recipe, plan), plan_for, capacity)
    others = _planned(_others(recipe), plan_for)
    found = ([largest] if largest else []) + others
    return [change for change in found if change.memory.peak <= capacity]


def together(recipe: Recipe, plan: Plan, plan_for: PlanFor, capacity: int) -> Change | None:
    """Changes added one by one until they fit; if they never do, those that need least.

    With what fits the micro-batch is as large as it can be.

    Returns:
        None where none needs less.
    """
    sizes = _micro_batches(recipe, plan)
    smallest = sizes[-1:]
    singles = [one for one in _others(recipe) if _planned([one], plan_for)]
    # 8-bit states cannot be divided or offloaded: either of both.
    orders = [
        [one for one in singles if not _has(one, "engine.kind=")],
        [one for one in singles if not _has(one, "optim.kind=adamw8bit")],
    ]
    best: Change | None = None
    for order in orders:
        taken: list[_Described] = []
        now = _one_planned(_joined([]), plan_for)
        for one in (*smallest, *order):
            tried = _one_planned(_joined([*taken, one]), plan_for)
            # Accumulation keeps whole gradients, so that a smaller micro-batch may need more.
            if tried and (now is None or tried.memory.peak < now.memory.peak):
                now, taken = tried, [*taken, one]
            if now and now.memory.peak <= capacity:
                others = [one for one in taken if one not in smallest]
                choices = [_joined([*size, *others]) for size in ([], *([size] for size in sizes))]
                return _first_that_fits(choices, plan_for, capacity) or now
        if now and taken and (best is None or now.memory.peak < best.memory.peak):
            best = now
    return best


def _has(described: _Described, beginning: str) -> bool:
    return any(setting.startswith(beginning) for setting in described[1])


def _joined(several: Sequence[_Described]) -> _Described:
    """Changes that hold together: a later setting of the same path wins."""
    settings = {setting.partition("=")[0]: setting for _, each in several for setting in each}
    return "; ".join(what for what, _ in several), tuple(settings.values())


def _planned(found: Iterable[_Described], plan_for: PlanFor) -> list[Change]:
    """Those that can be planned."""
    return [change for one in found if (change := _one_planned(one, plan_for))]


def _one_planned(described: _Described, plan_for: PlanFor) -> Change | None:
    what, settings = described
    with suppress(UserError, UnknownMemory):
        return Change(what, settings, plan_for(settings))
    return None


def _first_that_fits(
    choices: Sequence[_Described], plan_for: PlanFor, capacity: int
) -> Change | None:
    """Of choices each of which needs less than the one before it, by halving the range."""
    low, high = 0, len(choices)
    best: Change | None = None
    while low < high:
        middle = (low + high) // 2
        change = _one_planned(choices[middle], plan_for)
        if change and change.memory.peak <= capacity:
            best, high = change, middle
        else:
            low = middle + 1
    return best


def _micro_batches(recipe: Recipe, plan: Plan) -> list[_Described]:
    """Half, a quarter and so on of the plan's, as far as there are such."""
    found: list[_Described] = []
    smaller = halved(recipe, plan)
    while smaller:
        size = smaller.micro_batch_size
        what = f"compute {size} sample{'s' * (size > 1)} at a time, and add up their gradients"
        found.append((what, (f"train.micro_batch_size={size}",)))
        smaller = halved(recipe, smaller)
    return found


def _others(recipe: Recipe) -> Iterator[_Described]:
    engine, optim = recipe.engine, recipe.optim
    if not engine.activation_checkpointing:
        what = "compute activations again in backward, at a third more time"
        yield what, ("engine.activation_checkpointing=true",)
    if isinstance(optim, AdamW):
        what = "store the optimizer's state in 8 bits"
        yield what, tuple(_switched("optim", optim, AdamW8bit))
    meaning = numerics(recipe.precision.mode)
    if not meaning.half_weights:
        half = meaning.compute_name if meaning.compute.itemsize == 2 else "bf16"
        settings = [f"precision.mode={half}-master"]
        if half == "bf16" and recipe.precision.loss_scale.kind != "none":
            settings.append("precision.loss_scale={kind: none}")
        yield f"store weights and activations in {half}, beside fp32 masters", tuple(settings)
    divisible: tuple[str, ...] = ()
    if isinstance(optim, AdamW8bit | Adafactor | Muon):  # which step whole weights
        divisible = tuple(_switched("optim", optim, AdamW))
    if not (isinstance(engine, Fsdp2) and engine.cpu_offload):
        what = "keep weights, gradients and optimizer state in host memory (fsdp2)"
        yield what, (*_switched("engine", engine, Fsdp2, cpu_offload=True), *divisible)
    if not (isinstance(engine, DeepSpeed) and engine.offload):
        what = "keep optimizer state and fp32 masters in host memory (ZeRO-Offload)"
        yield what, (*_switched("engine", engine, DeepSpeed, offload=True), *divisible)


def _switched(
    section: str, now: BaseModel, kind: type[BaseModel], **values: object
) -> Iterator[str]:
    """A section of another kind, which keeps the values of now that have a meaning there."""
    given = [f"{section}.{name}={_flow(value)}" for name, value in values.items()]
    if isinstance(now, kind):
        yield from given
        return
    yield f"{section}.kind={get_args(kind.model_fields['kind'].annotation)[0]}"
    yield from given
    written = now.model_dump(mode="json")
    for name, field in kind.model_fields.items():
        if name == "kind" or name in values or name not in written:
            continue
        if getattr(now, name) != field.get_default(call_default_factory=True):
            yield f"{section}.{name}={_flow(written[name])}"


def _flow(value: object) -> str:
    """As YAML writes it in a line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")
