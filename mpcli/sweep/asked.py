"""What is asked of a sweep, and the cells that answer it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import ValidationError

from mpcli.recipe import nodes
from mpcli.recipe.dump import written
from mpcli.recipe.errors import Problem, UserError, did_you_mean, user_error
from mpcli.recipe.load import LoadedRecipe
from mpcli.recipe.precision import Mode, StaticScale
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.source import Source
from mpcli.sweep.cells import Cell
from mpcli.sweep.text import number_text

Kind = Literal["loss-scale", "precision", "grid"]
ScaleValue = float | Literal["dynamic"]

SCALES: tuple[ScaleValue, ...] = (*(2.0**power for power in range(0, 25, 4)), "dynamic")
MODES: tuple[Mode, ...] = ("fp32", "bf16", "fp16", "bf16-master", "fp16-master")
ANSWERS = 3
"""Of a loss-scale sweep that are tried at most, each because the runs of the last changed it."""
MOST_STEPS = 100
"""Of each run of a loss-scale sweep, where nobody says how many."""

_SCALED = tuple(mode for mode in get_args(Mode) if mode.startswith("fp16"))
_VALUES = "such as `--values 2^8..2^15` or `--values 1,256,65536,dynamic`"
_OVER = "such as `--over optim.lr=1e-3,3e-3`"


@dataclass(frozen=True)
class Asked:
    """A sweep before it runs.

    Attributes:
        cells: one for each setting and seed, the seeds of a setting together.
        steps: of each run; None: the recipe's own.
        what: the values, modes or settings, as they are written to `study.json`.
    """

    kind: Kind
    cells: tuple[Cell, ...]
    steps: int | None
    seeds: tuple[int, ...]
    what: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """What a sweep that is gone on with has to agree with."""
        return {"steps": self.steps, "seeds": list(self.seeds), **self.what}


def loss_scale_sweep(
    recipe: Recipe, values: Sequence[ScaleValue], *, steps: int, seeds: int
) -> Asked:
    """An fp32 reference and the recipe at each scale, sampled at three moments."""
    precise = ("precision.mode=fp32", "precision.loss_scale={kind: none}")
    settings = {"fp32": precise, **{scale_label(v): _scaled(recipe, v) for v in values}}
    short = _short(recipe, steps)
    every = _seeds(recipe, seeds)
    cells = _cells({label: (*short, *own) for label, own in settings.items()}, every)
    return Asked("loss-scale", cells, steps, every, {"values": list(values)})


def short_steps(steps: int) -> int:
    """Of each run of a loss-scale sweep: half as many as the recipe's, but for long ones."""
    return min(MOST_STEPS, math.ceil(steps / 2))


def confirming(
    recipe: Recipe, setting: str, number: int, *, steps: int, seeds: int
) -> tuple[Cell, ...]:
    """The cells of a loss-scale sweep that try what it recommends.

    Args:
        setting: `precision.loss_scale=...`.
        number: 1 for the first answer, 2 for the one that its runs change it to, and so on.
    """
    label = "recommended" if number == 1 else f"recommended-{number}"
    return _cells({label: (*_short(recipe, steps), setting)}, _seeds(recipe, seeds))


def precision_sweep(
    recipe: Recipe, modes: Sequence[Mode], *, steps: int | None, seeds: int
) -> Asked:
    """The recipe in each mode, with the same seeds."""
    every = _seeds(recipe, seeds)
    length = _length(steps)
    cells = _cells({mode: (*length, *_in_mode(recipe, mode)) for mode in modes}, every)
    return Asked("precision", cells, steps, every, {"modes": list(modes)})


def grid_sweep(
    recipe: Recipe, over: Sequence[Sequence[str]], *, steps: int | None, seeds: int
) -> Asked:
    """The recipe with every combination of settings.

    Args:
        over: for each path the `path=value` of its values.
    """
    every = _seeds(recipe, seeds)
    length = _length(steps)
    cells = _cells({label: (*length, *own) for label, own in points(over).items()}, every)
    return Asked("grid", cells, steps, every, {"over": [list(one) for one in over]})


def points(over: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Every combination of settings, by its label."""
    return {" ".join(point): point for point in itertools.product(*over)}


def _cells(settings: dict[str, tuple[str, ...]], seeds: Iterable[int]) -> tuple[Cell, ...]:
    return tuple(Cell(label, own, seed) for label, own in settings.items() for seed in seeds)


def _seeds(recipe: Recipe, number: int) -> tuple[int, ...]:
    return tuple(range(recipe.train.seed, recipe.train.seed + number))


def _length(steps: int | None) -> tuple[str, ...]:
    return () if steps is None else (f"train.steps={steps}",)


def _short(recipe: Recipe, steps: int) -> tuple[str, ...]:
    """Nothing but the training, sampled in the first step, after a tenth and in the last."""
    moments = sorted({1, max(1, steps // 10), steps})
    settings = (
        *_length(steps),
        "eval.every=null",
        "output.checkpoint_every=null",
        "output.keep_best=null",
        "output.trackers=[]",
        f"probe={{every: 0, shadow_every: 0, steps: {written(moments)}}}",
    )
    if recipe.train.on_nonfinite == "rollback":  # to checkpoints, of which there are none
        settings = (*settings, "train.on_nonfinite=skip")
    return settings


# Scales


def check_scaled(loaded: LoadedRecipe) -> None:
    """A sweep of loss scales is one of a mode that has a loss scale.

    Raises:
        UserError: exit 2.
    """
    mode = loaded.recipe.precision.mode
    if mode not in _SCALED:
        what = f"mode `{mode}` has no loss scale to sweep: its gradients do not underflow"
        if mode.startswith("bf16"):
            what = f"mode `{mode}` has no loss scale to sweep: bf16 has the exponents of fp32"
        problem = Problem(what, "add `--set precision.mode=fp16`", "precision.mode")
        raise UserError(problem.at(loaded.place("precision.mode")))


def scale_label(value: ScaleValue) -> str:
    """`scale=256` or `dynamic`."""
    return value if value == "dynamic" else f"scale={number_text(value)}"


def scales(text: str) -> tuple[ScaleValue, ...]:
    """The values of `--values`, each once: `2^8..2^15`, `256`, `0.5`, `dynamic`.

    Raises:
        UserError: exit 2, one of them is none, or beyond what a recipe may have.
    """
    found = itertools.chain.from_iterable(_scales(part.strip()) for part in text.split(","))
    return tuple(dict.fromkeys(found))


def _scales(part: str) -> Sequence[ScaleValue]:
    if part == "dynamic":
        return ("dynamic",)
    first, dots, last = part.partition("..")
    low = _scale(first.strip(), part)
    if not dots:
        return [low]
    high = _scale(last.strip(), part)
    powers = [math.log2(end) for end in (low, high)]
    if not all(power.is_integer() for power in powers):
        raise user_error(f"--values: `{part}`: the ends of a range are powers of two", _VALUES)
    if low > high:
        hint = f"write `{last.strip()}..{first.strip()}`"
        raise user_error(f"--values: `{part}`: the range ends before it begins", hint)
    return [2.0**power for power in range(int(powers[0]), int(powers[1]) + 1)]


def _scale(text: str, part: str) -> float:
    power = re.fullmatch(r"2\^(-?[0-9]{1,4})", text)
    try:
        value = 2.0 ** int(power[1]) if power else nodes.resolve(text)
    except OverflowError:
        value = math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = part or text
        what = f"--values: expected a scale, found `{shown}`" if shown else "--values: one is empty"
        raise user_error(what, _VALUES)
    try:
        return StaticScale(kind="static", scale=float(value)).scale
    except (ValidationError, OverflowError):
        what = f"--values: `{part}` is not between 2^-126 and 2^127, the normal numbers of fp32"
        raise user_error(what, _VALUES) from None


def _scaled(recipe: Recipe, value: ScaleValue) -> tuple[str, ...]:
    if value != "dynamic":
        return (f"precision.loss_scale={{kind: static, scale: {number_text(value)}}}",)
    own = recipe.precision.loss_scale.kind == "dynamic"
    return () if own else ("precision.loss_scale={kind: dynamic}",)


# Modes


def modes(text: str) -> tuple[Mode, ...]:
    """The modes of `--modes`, each once.

    Raises:
        UserError: exit 2, one of them is none.
    """
    known: tuple[Mode, ...] = get_args(Mode)
    names = [part.strip() for part in text.split(",")]
    problems = [
        Problem(f"--modes: unknown mode `{name}`", did_you_mean(name, known))
        for name in names
        if name not in known
    ]
    if problems:
        raise UserError(*problems)
    return tuple(mode for mode in dict.fromkeys(names) if mode in known)


def _in_mode(recipe: Recipe, mode: Mode) -> tuple[str, ...]:
    """The recipe's own loss scale where it has one for this, else the mode's default."""
    precision = recipe.precision
    settings = [f"precision.mode={mode}"]
    if mode not in _SCALED:
        settings.append("precision.loss_scale={kind: none}")
    elif precision.mode not in _SCALED:
        settings.append("precision.loss_scale={kind: dynamic}")
    if precision.stochastic_rounding and mode != "bf16-pure":
        settings.append("precision.stochastic_rounding=false")
    return tuple(settings)


# Grids


def grid(options: Sequence[str], overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """For each `--over` the `path=value` of its values, each once.

    Args:
        options: `path=V1,V2`; values obey the rules of YAML, a list or a mapping is one value.
        overrides: `path=value` of `--set`.

    Raises:
        UserError: exit 2, with every option that says nothing or sets what another one does.
    """
    if not options:
        raise user_error("nothing to sweep over", f"add `--over`, {_OVER}")
    taken = {override.partition("=")[0]: "--set" for override in overrides}
    taken["train.seed"] = "--seeds"
    over: list[tuple[str, ...]] = []
    problems: list[Problem] = []
    for number, option in enumerate(options, start=1):
        path, equals, values = option.partition("=")
        if not (equals and path and values.strip()):
            problems.append(Problem(f"--over: expected `path=V1,V2`, found `{option}`", _OVER))
        elif path in taken:
            hint = f"keep one of them: a list of values, {_OVER}"
            if taken[path] == "--seeds":
                hint = "`--seeds K` gives every setting the same K seeds"
            what = f"--over: `{path}` is set by `{taken[path]}` too"
            problems.append(Problem(what, hint))
        else:
            taken[path] = "--over"
            try:
                over.append(_settings(path, values, option, number))
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return over


def _settings(path: str, values: str, option: str, number: int) -> tuple[str, ...]:
    source = Source("--over", f"[{values}]", number, len(path) + 1, (option,))
    root, problems = nodes.parse(source)
    if problems:
        raise UserError(*problems)
    if not isinstance(root, nodes.Sequence):
        raise source.error(0, 0, "expected values with commas between them", _OVER)
    settings: dict[str, str] = {}
    for item in root.items:
        settings.setdefault(repr(nodes.plain(item)), f"{path}={_text(item)}")
    return tuple(settings.values())


def _text(node: nodes.Node) -> str:
    """A value as its author wrote it, or as recipes write it."""
    if isinstance(node, nodes.Scalar):
        return written(node.value) if node.quoted else node.written
    if isinstance(node, nodes.Sequence):
        return f"[{', '.join(map(_text, node.items))}]"
    fields = (f"{written(key)}: {_text(entry.node)}" for key, entry in node.entries.items())
    return f"{{{', '.join(fields)}}}"
