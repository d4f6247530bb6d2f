"""With whom a process of `mptrain run` trains, and how it joins them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from mpcli.cli.console import display, write
from mpcli.cli.errors import fail, show_problems, write_json
from mpcli.cli.result import show_result, show_warnings
from mpcli.position import Position, position
from mpcli.recipe.errors import Exit, Problem, UserError, user_error
from mpcli.signals import held, uninterrupted

if TYPE_CHECKING:
    from mpcli.meeting import Meeting
    from mpcli.recipe.load import LoadedRecipe
    from mpcli.records import Plan, Result
    from mpcli.rundir import RunDirectory


@dataclass(frozen=True)
class Group:
    """With whom this process trains.

    Attributes:
        place: in a group that torchrun, srun or a script started.
        nodes: machines with a launcher each, which meet at `endpoint`.
    """

    place: Position | None = None
    nodes: int = 1
    endpoint: str | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What the plan needs to know."""
        place = self.place
        return {
            "world_size": place.world_size if place else None,
            "nodes": self.nodes,
            "local_rank": place.local_rank if place else 0,
        }


def group_of(nodes: int | None, endpoint: str | None) -> Group:
    """What the options and the environment say.

    Raises:
        UserError: exit 2, one of them is missing or says nothing.
    """
    if nodes is None and endpoint is None:
        place = position(os.environ)
        if place and place.rank:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # what is printed is rank 0's
        return Group(place)
    if endpoint is None and nodes != 1:
        raise user_error(
            f"`--nodes {nodes}` without a place where the machines meet",
            "add `--rdzv-endpoint HOST:PORT`: one of the machines, and a free port there",
        )
    if nodes is None:
        raise user_error("`--rdzv-endpoint` without `--nodes`", "add the number of machines")
    return Group(nodes=nodes, endpoint=endpoint if nodes > 1 else None)


def supervised(
    run: RunDirectory,
    loaded: LoadedRecipe,
    planned: Plan,
    environment: Mapping[str, Any],
    meeting: Meeting | None = None,
) -> Result:
    """Train in processes that this one starts and watches."""
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


def meet(
    begin: Callable[[Plan], tuple[RunDirectory, dict[str, Any]]],
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
        from mpcli.member import facts

    write(f"waiting for the launchers of {nodes} machines at {endpoint}", sys.stderr)
    plugin_sha256 = loaded.plugin.sha256 if loaded.plugin else None
    meeting = Meeting(endpoint, nodes, facts(loaded.recipe, planned, plugin_sha256))
    try:
        if not meeting.is_chief:
            ended, why, followed = follow(meeting, planned.world_size, loaded.plugin)
            problems = [Problem(why)] if why else []
            if result := followed and followed.result():
                show_problems(problems)
                if as_json:
                    write_json(result.model_dump(mode="python"))
                raise typer.Exit(ended)
            raise typer.Exit(fail(problems, ended, as_json=as_json))
        code, reason = Exit.BUG, None
        try:
            show_warnings(loaded, warnings)
            with held():
                directory, found = begin(planned)
                result = supervised(directory, loaded, planned, found, meeting)
                code, reason = Exit(result.exit_code), result.reason
        except UserError as error:
            code, reason = error.exit_code, error.problems[0].what
            raise
        finally:
            meeting.dismiss(code, reason)
        show_result(result, directory, loaded, as_json=as_json)
    finally:
        meeting.leave()


def take_part(
    begin: Callable[[Plan], tuple[RunDirectory, dict[str, Any]]],
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
        from mpcli.member import Silent, agreed, begin_together, enter, take_part
        from mpcli.ranks import leave

    began = time.monotonic()
    if place.rank == 0:
        show_warnings(loaded, warnings)
    with explained_loss():
        ranks = enter(place, loaded.recipe, planned, loaded.plugin)
        planned = agreed(ranks, planned)
        with held():
            run = begin_together(ranks, place, begin, loaded.recipe, planned)
    shown = display() if ranks.is_main else Silent()
    with held(), reported(run, shown):
        ending = take_part(run, loaded.recipe, shown, ranks)
        if run.ended:
            leave()
        else:
            ending = conclude(run, loaded.recipe, planned.world_size, began)
    result = run.result()
    if ranks.is_main and not run.ended and place.restarts_left:
        show_problems(ending.problems)  # the result will be another's
    elif ranks.is_main and result:
        if ending.exit_code is Exit.BUG:
            write(root_traceback(run), sys.stderr)
        show_result(result, run, loaded, as_json=as_json)
    raise typer.Exit(ending.exit_code)
