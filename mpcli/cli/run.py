"""`mptrain run`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mpcli.cli.console import display, memory_text, metric_text, show_table, write
from mpcli.cli.errors import show_problems, write_json
from mpcli.cli.options import AsJson, Overrides, PluginPath, Strict
from mpcli.cli.plan import make
from mpcli.cli.plugin import named_plugin, plugin_of_run
from mpcli.position import Position, position
from mpcli.recipe.errors import Exit, Place, Problem, UserError, user_error
from mpcli.signals import held, uninterrupted

if TYPE_CHECKING:
    from mpcli.meeting import Meeting
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
    group = _group(nodes, rdzv_endpoint)
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
        recipe, overrides, named_plugin(plugin), strict=strict, **group.sizes
    )

    from mpcli.machine import environment

    with uninterrupted():
        from mpcli.rundir import RunDirectory

    folder = None if output is None else Path(output)

    def create() -> tuple[RunDirectory, dict[str, Any]]:
        found = environment()
        return RunDirectory.create(loaded, planned, found, folder), found

    _train(create, loaded, planned, warnings, group, as_json=as_json)


@dataclass(frozen=True)
class _Group:
    """With whom this process trains.

    Attributes:
        place: in a group that torchrun, srun or a script started.
        nodes: machines with a launcher each, which meet at `endpoint`.
    """

    place: Position | None = None
    nodes: int = 1
    endpoint: str | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """What the plan needs to know."""
        return {"world_size": self.place.world_size if self.place else None, "nodes": self.nodes}


def _group(nodes: int | None, endpoint: str | None) -> _Group:
    if nodes is None and endpoint is None:
        place = position(os.environ)
        if place and place.rank:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # what is printed is rank 0's
        return _Group(place)
    if endpoint is None and nodes != 1:
        raise user_error(
            f"`--nodes {nodes}` without a place where the machines meet",
            "add `--rdzv-endpoint HOST:PORT`: one of the machines, and a free port there",
        )
    if nodes is None:
        raise user_error("`--rdzv-endpoint` without `--nodes`", "add the number of machines")
    return _Group(nodes=nodes, endpoint=endpoint if nodes > 1 else None)


def _resume(
    path: str,
    overrides: list[str],
    plugin_path: str | None,
    group: _Group,
    *,
    strict: bool,
    as_json: bool,
) -> NoReturn:
    """Go on with a run whose recipe is the same, but for what may change."""
    from mpcli.recipe.changes import allowed_changes
    from mpcli.recipe.load import load_recipe
    from mpcli.rundir import RunDirectory

    if path == "":
        raise user_error("`--resume` names no folder", "such as `runs/NAME/latest`")
    alone = group.place is None and group.endpoint is None
    directory = RunDirectory.open(Path(path)) if alone else RunDirectory.read(Path(path))
    try:
        plugin = plugin_of_run(directory, plugin_path)
        before = load_recipe(directory.recipe_path, plugin=plugin).recipe
        changes = allowed_changes(before, load_recipe(directory.recipe_path, overrides, plugin))
        recipe_path = str(directory.recipe_path)
        loaded, planned, warnings = make(
            recipe_path, overrides, plugin, strict=strict, **group.sizes
        )
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

        def go_on() -> tuple[RunDirectory, dict[str, Any]]:
            found = environment()
            opened = directory if alone else RunDirectory.open(Path(path))
            opened.begin_attempt(loaded.recipe, planned, found, changes)
            return opened, found

        _train(go_on, loaded, planned, warnings, group, as_json=as_json)
    finally:
        directory.close()


def _train(
    begin: Callable[[], tuple[RunDirectory, dict[str, Any]]],
    loaded: LoadedRecipe,
    planned: Plan,
    warnings: list[Problem],
    group: _Group,
    *,
    as_json: bool,
) -> NoReturn:
    """Train in this process, in some that it starts, or as one that something else started.

    Args:
        begin: makes an attempt, and says in what environment.
    """
    distributed = loaded.recipe.engine.kind != "local"
    if distributed and group.place:
        _take_part(begin, loaded, planned, warnings, group.place, as_json=as_json)
    if distributed and group.endpoint:
        _meet(begin, loaded, planned, warnings, group.endpoint, group.nodes, as_json=as_json)
    with uninterrupted():
        from mpcli.launch import launch

    _show_warnings(loaded, warnings)
    with held():
        directory, found = begin()
        if distributed:
            result = _supervised(directory, loaded, planned, found)
        else:
            result = launch(directory, display(), loaded.plugin)
        _show_result(result, directory, loaded, as_json=as_json)


def _supervised(
    run: RunDirectory,
    loaded: LoadedRecipe,
    planned: Plan,
    environment: Mapping[str, Any],
    meeting: Meeting | None = None,
) -> Result:
    from mpcli.elastic import supervise

    try:
        return supervise(
            run,
            loaded.recipe,
            planned,
            environment,
            lambda line: write(line, sys.stderr),
            loaded.plugin,
            meeting,
        )
    finally:
        run.close()


def _meet(
    begin: Callable[[], tuple[RunDirectory, dict[str, Any]]],
    loaded: LoadedRecipe,
    planned: Plan,
    warnings: list[Problem],
    endpoint: str,
    nodes: int,
    *,
    as_json: bool,
) -> NoReturn:
    """Train on several machines: the launcher that comes first leads the others."""
    with uninterrupted():
        from mpcli.elastic import follow
        from mpcli.meeting import Meeting

    meeting = Meeting(endpoint, nodes)
    try:
        if not meeting.is_chief:
            raise typer.Exit(follow(meeting, planned.world_size, loaded.plugin))
        code = Exit.BUG
        try:
            _show_warnings(loaded, warnings)
            with held():
                directory, found = begin()
                result = _supervised(directory, loaded, planned, found, meeting)
                code = Exit(result.exit_code)
        except UserError as error:
            code = error.exit_code
            raise
        finally:
            meeting.tell(exit_code=code)
        _show_result(result, directory, loaded, as_json=as_json)
    finally:
        meeting.leave()


def _take_part(
    begin: Callable[[], tuple[RunDirectory, dict[str, Any]]],
    loaded: LoadedRecipe,
    planned: Plan,
    warnings: list[Problem],
    place: Position,
    *,
    as_json: bool,
) -> NoReturn:
    """Train as one of the processes that torchrun, srun or a script started."""
    with uninterrupted():
        from mpcli.elastic import conclude, root_traceback
        from mpcli.launch import explained_loss, reported
        from mpcli.member import Silent, begin_together, enter, take_part
        from mpcli.ranks import leave

    if place.rank == 0:
        _show_warnings(loaded, warnings)
    with explained_loss():
        ranks = enter(place, loaded.recipe, planned, loaded.plugin)
        with held():
            run = begin_together(ranks, place, begin, loaded.recipe, planned)
    shown = display() if ranks.is_main else Silent()
    with held(), reported(run, shown):
        ending = take_part(run, loaded.recipe, shown, ranks)
        if run.ended:
            leave()
        else:
            ending = conclude(run, loaded.recipe, planned.world_size)
    result = run.result()
    if ranks.is_main and not run.ended and place.restarts_left:
        show_problems(ending.problems)  # the result will be another's
    elif ranks.is_main and result:
        if ending.exit_code is Exit.BUG:
            write(root_traceback(run), sys.stderr)
        _show_result(result, run, loaded, as_json=as_json)
    raise typer.Exit(ending.exit_code)


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
