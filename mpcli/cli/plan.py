"""`mptrain plan`, and what `run` shares with it."""

from __future__ import annotations

import math
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcli.cli.console import memory_text, show_table, write
from mpcli.cli.errors import as_records, show_problems, write_json
from mpcli.cli.options import AsJson, Overrides, PluginPath, RecipePath, Strict
from mpcli.cli.plugin import named_plugin
from mpcli.recipe.errors import Problem, UserError, user_error
from mpcli.signals import uninterrupted
from mpcli.sizes import size_text

if TYPE_CHECKING:
    from mpcli.plan.capacity import Change, Fit
    from mpcli.recipe.load import LoadedRecipe
    from mpcli.recipe.plugin import PluginFile
    from mpcli.recipe.recipe import Recipe
    from mpcli.records import MemoryPlan, Plan

Capacity = Annotated[
    str | None,
    typer.Option(
        "--capacity",
        metavar="SIZE",
        help="Say whether it fits a device of this memory, such as 24GiB, and what would make it.",
        show_default=False,
    ),
]
WIDTH = 80  # of a terminal
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def plan(
    recipe: RecipePath,
    overrides: Overrides,
    plugin: PluginPath = None,
    capacity: Capacity = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do, and every problem.

    Each value of the recipe with its origin, the precision of each module, the number of
    parameters, processes and steps, the memory of a process.
    """
    room = None if capacity is None else size_in_bytes(capacity)
    file = named_plugin(plugin)
    loaded, planned, warnings = make(recipe, overrides, file, strict=strict, memory=True)
    fit = None
    if room is not None:

        def plan_for(settings: tuple[str, ...]) -> MemoryPlan:
            replaced = _replaced(overrides, settings)
            changed = [*(o for o in overrides if o not in replaced), *settings]
            return _memory(make(recipe, changed, file, strict=False, memory=True)[1])

        from mpcli.plan.capacity import answer

        fit = answer(loaded.recipe, planned, plan_for, room)
    if as_json:
        write_json(
            {
                "status": "done",
                "exit_code": 0,
                "recipe": loaded.recipe.model_dump(mode="json"),
                "origins": dict(loaded.origins),
                "dropped": list(loaded.dropped),
                "plan": planned.model_dump(mode="json"),
                **({} if fit is None else _fit_record(fit, overrides)),
                "problems": as_records(warnings),
            }
        )
    else:
        _show(loaded, planned)
        if fit is not None:
            _show_fit(fit, overrides)
        show_problems(warnings)


def size_in_bytes(text: str) -> int:
    """Of a size such as `24GiB`.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?) ?([KMGT]i?B)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if not size:
        raise user_error(f"--capacity is a size, found `{text}`", "write it as 24GiB or 500MB")
    return size


def _memory(planned: Plan) -> MemoryPlan:
    from mpcli.plan.memory import UnknownMemory

    if planned.memory is None:
        raise UnknownMemory(planned.memory_unknown)
    return planned.memory


def _replaced(overrides: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Overrides that do not go with settings: of the same path, or of a section of another kind."""
    paths = {setting.partition("=")[0] for setting in settings}
    sections = {path.removesuffix(".kind") for path in paths if path.endswith(".kind")}
    return [
        override
        for override in overrides
        if (path := override.partition("=")[0]) in paths or path.partition(".")[0] in sections
    ]


def _fit_record(fit: Fit, overrides: Sequence[str]) -> dict[str, Any]:
    least = fit.least
    return {
        "capacity_bytes": fit.capacity,
        "fits": fit.fits,
        "changes": [_change_record(change, overrides) for change in fit.changes],
        "least": None if least is None else _change_record(least, overrides),
        "lacking": list(fit.lacking),
    }


def _change_record(change: Change, overrides: Sequence[str]) -> dict[str, Any]:
    memory = change.memory.model_dump(mode="json")
    replaced = _replaced(overrides, change.settings)
    return {
        "what": change.what,
        "set": list(change.settings),
        "instead_of": replaced,
        "memory": memory,
    }


def _show_fit(fit: Fit, overrides: Sequence[str]) -> None:
    """The answer to `--capacity`, with changes as they are typed."""
    size = size_text(fit.capacity)
    if fit.peak is None:
        write(f"Whether it fits {size} is not known.")
        return
    if fit.fits:
        write(f"It fits {size}: at most {size_text(fit.peak)} are needed at once.")
        return
    write(f"It does not fit {size}: {size_text(fit.peak)} are needed at once.")
    if fit.changes:
        write("It fits with:" if len(fit.changes) == 1 else "It fits with any of these:")
    elif fit.least:
        write(f"Nothing here makes it fit: at least {size_text(fit.least.memory.peak)}, with")
    else:
        write("Nothing here makes it fit.")
    for change in fit.changes or ([fit.least] if fit.least else []):
        about = f"{change.what}: {size_text(change.memory.peak)}"
        write(textwrap.fill(about, WIDTH, initial_indent="- ", subsequent_indent="  "))
        write(_as_typed(change.settings))
        if replaced := _replaced(overrides, change.settings):
            write(f"  instead of\n{_as_typed(replaced)}")
    for lacking in fit.lacking:
        write(f"Not looked at: {lacking}")


def _as_typed(settings: Sequence[str]) -> str:
    """Options for a shell, in lines that it reads as one."""
    lines = [""]
    for option in (f" --set {shlex.quote(setting)}" for setting in settings):
        if lines[-1] and len(lines[-1] + option) > WIDTH - 6:
            lines.append("")
        lines[-1] += option
    return " \\\n".join(f"   {line}" for line in lines)


def make(
    recipe: str,
    overrides: list[str],
    plugin: PluginFile | None,
    *,
    strict: bool,
    world_size: int | None = None,
    nodes: int = 1,
    local_rank: int = 0,
    memory: bool = False,
) -> tuple[LoadedRecipe, Plan, list[Problem]]:
    """Load and plan a recipe; the problems are the plan's warnings, with their places.

    Args:
        world_size: of the group that this process was started in.
        nodes: machines that take part.
        local_rank: of this process on its machine.
        memory: whether to plan that too.

    Raises:
        UserError: every error of the recipe, or of the plan, or with `strict` every warning.
    """
    from mpcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides, plugin)
    planned = planned_for(
        loaded,
        strict=strict,
        world_size=world_size,
        nodes=nodes,
        local_rank=local_rank,
        memory=memory,
    )
    return loaded, *planned


def planned_for(
    loaded: LoadedRecipe,
    *,
    strict: bool = False,
    training: bool = True,
    world_size: int | None = None,
    nodes: int = 1,
    local_rank: int = 0,
    memory: bool = False,
) -> tuple[Plan, list[Problem]]:
    """Plan a recipe; the problems are the plan's warnings, with their places.

    Args:
        training: whether it is to be trained, not only evaluated.
        world_size: of the group that this process was started in.
        nodes: machines that take part.
        local_rank: of this process on its machine.
        memory: whether to plan that too.

    Raises:
        UserError: every error of the plan, or with `strict` every warning.
    """
    from mpcli.machine import detect_machine

    machine = detect_machine(local_rank)  # reports a broken torch before the next lines import it
    try:
        with uninterrupted():
            from mpcli.plan import make_plan
            from mpcli.plan.processes import Group

            group = Group(world_size, nodes)
            planned = make_plan(
                loaded.recipe, machine, group=group, training=training, memory=memory
            )
    except UserError as error:
        raise UserError(*(p.at(loaded.place(p.path)) for p in error.problems)) from error
    warnings = [
        Problem(w.message, w.hint, path=w.path, severity="warning", finding=w.finding).at(
            loaded.place(w.path)
        )
        for w in planned.warnings
    ]
    if strict and warnings:
        raise UserError(*(replace(warning, severity="error") for warning in warnings))
    return planned, warnings


def _show(loaded: LoadedRecipe, planned: Plan) -> None:
    values = loaded.recipe.model_dump(mode="json")
    show_table(
        "Recipe",
        ("value", "", "from"),
        [(path, _value_at(values, path), origin) for path, origin in loaded.origins.items()],
    )
    for message in loaded.dropped:
        write(message)
    show_table(
        "Precision",
        ("module", "type", "parameters", "stored", "computed", "gradient", "master", "why"),
        [
            (
                m.name or "(model)",
                m.type,
                f"{m.parameters:,}" if m.parameters else "-",
                m.stored,
                m.computed,
                m.gradient,
                m.master,
                m.why,
            )
            for m in planned.modules
        ],
    )
    show_table("Run", ("", ""), _summary(loaded.recipe, planned))
    if planned.memory:
        show_table("Memory of a process", ("part", "bytes", "when"), _memory_rows(planned))
    elif planned.memory_unknown:
        write(f"memory: not known ({planned.memory_unknown})")


def _memory_rows(planned: Plan) -> list[tuple[str, str, str]]:
    memory = planned.memory
    assert memory is not None
    always, peak_at = "always", f"at the peak, in {memory.peak_at}"
    rows = [
        ("weights", memory.weights, always),
        ("fp32 masters", memory.masters, always),
        ("optimizer state", memory.optimizer, always),
        ("averaged weights", memory.average, always),
        ("buffers", memory.buffers, always),
        ("batch", memory.batch, always),
        ("gradients", memory.gradients, "from backward to the update"),
        ("activations", memory.activations, "from forward to backward, of a micro-batch"),
        ("temporary", memory.temporary, peak_at),
        ("in host memory", memory.host, "always, offloaded"),
    ]
    shown = [(part, memory_text(size), when) for part, size, when in rows if size]
    where = f"{planned.device}, in {memory.peak_at}"
    if memory.host and planned.device == "cpu":
        where += "; a CPU's memory is the host's, so it is in it"
    return [*shown, ("peak", memory_text(memory.peak), where)]


def _summary(recipe: Recipe, planned: Plan) -> list[tuple[str, str]]:
    """The plan's totals, as label and value."""
    processes = f"{planned.world_size:,} ({recipe.engine.kind})"
    micro_batch = f"{planned.micro_batch_size:,} x {planned.accumulation} per step"
    if recipe.train.micro_batch_size == "auto":
        whole = math.ceil(recipe.train.global_batch_size / planned.world_size)
        micro_batch += f" (auto: {planned.micro_batch_size:,} of {whole:,})"
    if planned.world_size > 1:
        batch = recipe.train.global_batch_size
        smallest, more = divmod(batch, planned.world_size)
        share = f"{smallest:,}" + (f" or {smallest + 1:,}" if more else "")
        processes += f", each with {share} of the {batch:,} samples of a step"
        micro_batch += " in each process"
    return [
        ("device", planned.device),
        ("processes", processes),
        ("data", planned.data_source),
        ("samples", f"{planned.num_train:,} to train on, {planned.num_eval:,} to evaluate on"),
        ("sample", ", ".join(f"{name} {about}" for name, about in planned.sample.items())),
        ("parameters", f"{planned.parameters:,}"),
        ("steps", f"{planned.steps:,} ({planned.steps_per_epoch:,} an epoch)"),
        ("micro-batch", micro_batch),
        ("host reads", f"{planned.host_reads:,} per step"),
    ]


def _value_at(values: Any, path: str) -> str:
    """The resolved value at a dotted path, as YAML would show it."""
    import yaml

    for key in path.split("."):
        values = values[int(key)] if isinstance(values, list) else values[key]
    text: str = yaml.safe_dump(values, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")
