"""`mptrain run`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mpcli.cli.console import display, write
from mpcli.cli.group import Group, group_of, meet, supervised, take_part
from mpcli.cli.options import AsJson, Overrides, PluginPath, Strict
from mpcli.cli.plan import make
from mpcli.cli.plugin import named_plugin, plugin_of_run
from mpcli.cli.result import show_result, show_warnings
from mpcli.recipe.errors import Problem, UserError, user_error
from mpcli.signals import held, uninterrupted

if TYPE_CHECKING:
    from mpcli.recipe.load import LoadedRecipe
    from mpcli.records import Plan
    from mpcli.rundir import RunDirectory


def run(
    overrides: Overrides,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Go on with a run, instead of a recipe; `--set` may change its length, "
            "intervals, micro-batch and engine.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The run directory itself; default: runs/<name>/<UTC time>-<recipe hash>.",
            show_default=False,
        ),
    ] = None,
    plugin: PluginPath = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Machines that take part; the same command is started on each.",
            show_default=False,
        ),
    ] = None,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where they meet: one of the machines, and a free port there.",
            show_default=False,
        ),
    ] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe says; leave a run directory.

    Processes that torchrun or srun started train together.
    """
    group = group_of(nodes, rdzv_endpoint)
    if resume is not None:
        if recipe is not None or output is not None:
            other = "a recipe" if recipe is not None else "`--output`"
            raise user_error(f"`--resume` and {other} are both given", "a run has its own: use one")
        _resume(resume, overrides, plugin, group, strict=strict, as_json=as_json)
    if recipe is None:
        raise user_error("missing argument `RECIPE`", "`mptrain run --help` shows the usage")
    if output == "":
        raise user_error("`--output` names no folder", "leave it out, or name a new folder")
    loaded, planned, warnings = make(
        recipe, overrides, named_plugin(plugin), strict=strict, **group.about
    )

    from mpcli.machine import environment

    with uninterrupted():
        from mpcli.rundir import RunDirectory

    folder = None if output is None else Path(output)

    def create(plan: Plan) -> tuple[RunDirectory, dict[str, Any]]:
        found = environment()
        return RunDirectory.create(loaded, plan, found, folder), found

    _train(create, loaded, planned, warnings, group, as_json=as_json)


def _resume(
    path: str,
    overrides: list[str],
    plugin_path: str | None,
    group: Group,
    *,
    strict: bool,
    as_json: bool,
) -> NoReturn:
    """Go on with a run whose recipe is the same, but for what may change."""
    from mpcli.recipe.changes import allowed_changes, refuse_kinds
    from mpcli.recipe.load import load_recipe
    from mpcli.rundir import RunDirectory

    if path == "":
        raise user_error("`--resume` names no folder", "such as `runs/NAME/latest`")
    alone = group.place is None and group.endpoint is None
    directory = RunDirectory.open(Path(path)) if alone else RunDirectory.read(Path(path))
    try:
        plugin = plugin_of_run(directory, plugin_path)
        before = load_recipe(directory.recipe_path, plugin=plugin).recipe
        refuse_kinds(before, overrides)
        changes = allowed_changes(before, load_recipe(directory.recipe_path, overrides, plugin))
        recipe_path = str(directory.recipe_path)
        loaded, planned, warnings = make(
            recipe_path, overrides, plugin, strict=strict, **group.about
        )
        _check_model(directory, planned, loaded)
        result = directory.result()
        done = result and result.status == "done" and directory.final_path.exists()
        if result and done and result.steps_attempted >= planned.steps:
            write(f"the run has its {result.steps_attempted:,} steps: nothing to do", sys.stderr)
            show_result(result, directory, loaded, as_json=as_json)
        if done and not directory.has_checkpoints():
            raise user_error(
                f"--resume {path}: the run is over and left no checkpoint to go on from",
                "begin a new run; `output.checkpoint_every` lets it be made longer later",
            )

        if smaller := _had_no_memory(directory, planned, loaded, overrides):
            sizes = (smaller.micro_batch_size, planned.micro_batch_size)
            why = "micro-batches of {:,} instead of {:,}: there was no memory for more".format(
                *sizes
            )
            changes, planned = [*changes, why], smaller

        from mpcli.machine import environment

        def go_on(plan: Plan) -> tuple[RunDirectory, dict[str, Any]]:
            found = environment()
            opened = directory if alone else RunDirectory.open(Path(path))
            opened.begin_attempt(loaded.recipe, plan, found, changes)
            return opened, found

        _train(go_on, loaded, planned, warnings, group, as_json=as_json)
    finally:
        directory.close()


def _train(
    begin: Callable[[Plan], tuple[RunDirectory, dict[str, Any]]],
    loaded: LoadedRecipe,
    planned: Plan,
    warnings: list[Problem],
    group: Group,
    *,
    as_json: bool,
) -> NoReturn:
    """Train in this process, in some that it starts, or as one that something else started.

    Args:
        begin: makes an attempt of a plan, and says in what environment.
    """
    distributed = loaded.recipe.engine.kind != "local"
    if distributed and group.place:
        take_part(begin, loaded, planned, warnings, group.place, as_json=as_json)
    if distributed and group.endpoint:
        meet(begin, loaded, planned, warnings, group.endpoint, group.nodes, as_json=as_json)
    with uninterrupted():
        from mpcli.launch import launch

    show_warnings(loaded, warnings)
    with held():
        directory, found = begin(planned)
        if distributed:
            result = supervised(directory, loaded, planned, found)
        else:
            result = launch(directory, display(), loaded.plugin)
        show_result(result, directory, loaded, as_json=as_json)


def _had_no_memory(
    run: RunDirectory, planned: Plan, loaded: LoadedRecipe, overrides: list[str]
) -> Plan | None:
    """The plan with the micro-batch of the attempt before, if that is smaller and nobody says more.

    A larger one is asked for with `--set`: of micro-batches, or of another engine.
    """
    from mpcli.plan.micro_batch import as_before

    if any(setting.startswith(("train.micro_batch_size", "engine")) for setting in overrides):
        return None
    try:
        smaller = as_before(loaded.recipe, planned, run.plan())
    except (OSError, ValueError):  # lost with the end of an attempt
        return None
    return smaller if smaller.micro_batch_size < planned.micro_batch_size else None


def _check_model(run: RunDirectory, planned: Plan, loaded: LoadedRecipe) -> None:
    """What lies outside the run may have changed, and the weights fit only what they learnt from.

    Raises:
        UserError: exit 2, another model or tokenizer comes of the same recipe.
    """
    try:
        before = run.plan().model_sha256
    except (OSError, ValueError):  # lost with the end of an attempt; checkpoints check the rest
        return
    if before is not None and before != planned.model_sha256:
        what = "the config of the model or its tokenizer is not what the run began with"
        hint = "put back the text, the tokenizer or the model that the recipe names, or begin anew"
        raise UserError(Problem(what, hint, "task", loaded.place("task")))
