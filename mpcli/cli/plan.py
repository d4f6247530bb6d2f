"""`mptrain plan`, and what `run` shares with it."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpcli.cli.console import show_table, write
from mpcli.cli.errors import as_records, show_problems, write_json
from mpcli.cli.options import AsJson, Overrides, PluginPath, RecipePath, Strict
from mpcli.cli.plugin import named_plugin
from mpcli.recipe.errors import Problem, UserError
from mpcli.signals import uninterrupted

if TYPE_CHECKING:
    from mpcli.recipe.load import LoadedRecipe
    from mpcli.recipe.plugin import PluginFile
    from mpcli.recipe.recipe import Recipe
    from mpcli.records import Plan


def plan(
    recipe: RecipePath,
    overrides: Overrides,
    plugin: PluginPath = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do, and every problem.

    Each value of the recipe with its origin, the precision of each module, the number of
    parameters, processes and steps.
    """
    loaded, planned, warnings = make(recipe, overrides, named_plugin(plugin), strict=strict)
    if as_json:
        write_json(
            {
                "status": "done",
                "exit_code": 0,
                "recipe": loaded.recipe.model_dump(mode="json"),
                "origins": dict(loaded.origins),
                "dropped": list(loaded.dropped),
                "plan": planned.model_dump(mode="json"),
                "problems": as_records(warnings),
            }
        )
    else:
        _show(loaded, planned)
        show_problems(warnings)


def make(
    recipe: str,
    overrides: list[str],
    plugin: PluginFile | None,
    *,
    strict: bool,
    world_size: int | None = None,
    nodes: int = 1,
    local_rank: int = 0,
) -> tuple[LoadedRecipe, Plan, list[Problem]]:
    """Load and plan a recipe; the problems are the plan's warnings, with their places.

    Args:
        world_size: of the group that this process was started in.
        nodes: machines that take part.
        local_rank: of this process on its machine.

    Raises:
        UserError: every error of the recipe, or of the plan, or with `strict` every warning.
    """
    from mpcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides, plugin)
    planned = planned_for(
        loaded, strict=strict, world_size=world_size, nodes=nodes, local_rank=local_rank
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
) -> tuple[Plan, list[Problem]]:
    """Plan a recipe; the problems are the plan's warnings, with their places.

    Args:
        training: whether it is to be trained, not only evaluated.
        world_size: of the group that this process was started in.
        nodes: machines that take part.
        local_rank: of this process on its machine.

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
            planned = make_plan(loaded.recipe, machine, group=group, training=training)
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
    ]


def _value_at(values: Any, path: str) -> str:
    """The resolved value at a dotted path, as YAML would show it."""
    import yaml

    for key in path.split("."):
        values = values[int(key)] if isinstance(values, list) else values[key]
    text: str = yaml.safe_dump(values, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")
