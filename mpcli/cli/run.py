"""`mptrain run`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mpcli.cli.console import display, memory_text, metric_text, show_table, write
from mpcli.cli.errors import show_problems, write_json
from mpcli.cli.options import AsJson, Overrides, PluginPath, Strict
from mpcli.cli.plan import make
from mpcli.cli.plugin import named_plugin, plugin_of_run
from mpcli.recipe.errors import Exit, Place, Problem, UserError, user_error
from mpcli.signals import held, uninterrupted

if TYPE_CHECKING:
    from mpcli.recipe.load import LoadedRecipe
    from mpcli.records import Plan, Result, ResultProblem
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
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe says; leave a run directory."""
    if resume is not None:
        if recipe is not None or output is not None:
            other = "a recipe" if recipe is not None else "`--output`"
            raise user_error(f"`--resume` and {other} are both given", "a run has its own: use one")
        _resume(resume, overrides, plugin, strict=strict, as_json=as_json)
    if recipe is None:
        raise user_error("missing argument `RECIPE`", "`mptrain run --help` shows the usage")
    if output == "":
        raise user_error("`--output` names no folder", "leave it out, or name a new folder")
    loaded, planned, warnings = make(recipe, overrides, named_plugin(plugin), strict=strict)

    from mpcli.machine import environment

    with uninterrupted():
        from mpcli.rundir import RunDirectory

    _show_warnings(loaded, warnings)
    folder = None if output is None else Path(output)
    found = environment()
    with held():
        directory = RunDirectory.create(loaded, planned, found, folder)
        result = _train(directory, loaded, planned, found)
        _show_result(result, directory, loaded, as_json=as_json)


def _resume(
    path: str, overrides: list[str], plugin_path: str | None, *, strict: bool, as_json: bool
) -> NoReturn:
    """Go on with a run whose recipe is the same, but for what may change."""
    from mpcli.recipe.changes import allowed_changes
    from mpcli.recipe.load import load_recipe
    from mpcli.rundir import RunDirectory

    if path == "":
        raise user_error("`--resume` names no folder", "such as `runs/NAME/latest`")
    directory = RunDirectory.open(Path(path))
    try:
        plugin = plugin_of_run(directory, plugin_path)
        before = load_recipe(directory.recipe_path, plugin=plugin).recipe
        changes = allowed_changes(before, load_recipe(directory.recipe_path, overrides, plugin))
        recipe_path = str(directory.recipe_path)
        loaded, planned, warnings = make(recipe_path, overrides, plugin, strict=strict)
        _check_model(directory, planned, loaded)
        result = directory.result()
        done = result and result.status == "done" and directory.final_path.exists()
        if result and done and result.steps_attempted >= planned.steps:
            write(f"the run has its {result.steps_attempted:,} steps: nothing to do", sys.stderr)
            _show_result(result, directory, loaded, as_json=as_json)
        if done and not directory.has_checkpoints():
            raise user_error(
                f"--resume {path}: the run is over and left no checkpoint to go on from",
                "begin a new run; `output.checkpoint_every` lets it be made longer later",
            )

        from mpcli.machine import environment

        _show_warnings(loaded, warnings)
        found = environment()
        with held():
            directory.begin_attempt(loaded.recipe, planned, found, changes)
            result = _train(directory, loaded, planned, found)
            _show_result(result, directory, loaded, as_json=as_json)
    finally:
        directory.close()


def _train(
    run: RunDirectory, loaded: LoadedRecipe, planned: Plan, environment: Mapping[str, Any]
) -> Result:
    """In this process, or in processes that it starts."""
    if loaded.recipe.engine.kind == "local":
        from mpcli.launch import launch

        return launch(run, display(), loaded.plugin)
    from mpcli.elastic import supervise

    return supervise(
        run,
        loaded.recipe,
        planned,
        environment,
        lambda line: write(line, sys.stderr),
        loaded.plugin,
    )


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


def _show_warnings(loaded: LoadedRecipe, warnings: list[Problem]) -> None:
    show_problems(warnings)
    for message in loaded.dropped:
        write(message, sys.stderr)


def _show_result(
    result: Result, directory: RunDirectory, loaded: LoadedRecipe, *, as_json: bool
) -> NoReturn:
    if as_json:
        write_json(result.model_dump(mode="python"))
    else:
        show_table("Result", ("", ""), _summary(result, directory.path))
    show_problems(
        Problem(
            p["message"],
            p["hint"],
            path=p["path"] or "",
            severity=p["severity"],
            finding=p["finding"],
        ).at(_place(p, loaded))
        for p in result.problems
    )
    if result.exit_code == Exit.NUMERICS:
        plugin = ["--plugin", loaded.plugin.file] if loaded.plugin else []
        write(
            f"find out why: {shlex.join(['mptrain', 'diagnose', str(directory.path), *plugin])}",
            sys.stderr,
        )
    raise typer.Exit(result.exit_code)


def _place(problem: ResultProblem, loaded: LoadedRecipe) -> Place | None:
    """Where a recorded problem is: in the plug-in, or in the recipe."""
    line, column = problem["line"], problem["column"]
    if loaded.plugin and line and column:
        return loaded.plugin.place(line, column - 1)
    if loaded.plugin and problem["file"]:
        return Place(loaded.plugin.file, 0, 0)
    return loaded.place(problem["path"] or "")


def _summary(result: Result, path: Path) -> list[tuple[str, str]]:
    metrics = {
        f"{split} {name}": metric_text(name, value)
        for split, values in result.metrics.items()
        for name, value in values.items()
    }
    return [
        ("status", result.status),
        *([("reason", result.reason)] if result.reason and not result.problems else []),
        ("steps", f"{result.steps_applied:,} applied, {result.steps_skipped:,} skipped"),
        *metrics.items(),
        ("time", f"{result.wall_seconds:.1f} s, {result.input_share:.1%} of it for input"),
        ("peak memory", memory_text(result.peak_memory_bytes or None)),
        ("run directory", str(path)),
    ]
