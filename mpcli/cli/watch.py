"""`mptrain watch`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpcli.cli.console import evaluation_text, write
from mpcli.cli.errors import show_problems
from mpcli.cli.options import named_or_newest
from mpcli.recipe.errors import Exit, Problem, user_error
from mpcli.recipe.render import visible
from mpcli.signals import Stopped, held, released, uninterrupted

if TYPE_CHECKING:
    from mpcli.cli.live import View
    from mpcli.rundir import RunDirectory
    from mpcli.watching import Watched

SECONDS = 0.5
"""Between two looks."""


def watch(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="A run directory, which need not be there yet; default: the newest run in `runs`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show a run as it goes on, until it ends; Ctrl-C leaves it alone."""
    place = named_or_newest(path)
    with uninterrupted():
        from mpcli.cli.live import ReaderLeft, view
        from mpcli.watching import Watched
    try:
        with held(), released():  # a terminal is put in order before the end
            run = _begun(place)
            with view() as shown:
                watched = _follow(Watched(run), shown)
    except KeyboardInterrupt as stopped:
        preempted = isinstance(stopped, Stopped) and stopped.preempted
        code = Exit.PREEMPTED if preempted else Exit.INTERRUPTED
        how = "ended by SIGTERM" if preempted else "interrupted"
        raise user_error(f"{how}; the run is left alone", exit_code=code) from None
    except ReaderLeft:
        return
    _tell_end(watched)


def _begun(place: Path) -> RunDirectory:
    """The run, as soon as it is there."""
    from mpcli.watching import begun

    run = begun(place)
    if run is None:
        write(visible(f"{place}: no run yet: waiting for one"), sys.stderr)
    while run is None:
        time.sleep(SECONDS)
        run = begun(place)
    return run


def _follow(watched: Watched, shown: View) -> Watched:
    from mpcli.cli.live import heading

    is_first = True
    while True:
        news = watched.look()
        if is_first:
            shown.say(heading(watched))
        if news.attempt:
            number, why = news.attempt
            shown.say(f"attempt {number}: {'; '.join(why)}" if why else f"attempt {number}")
        for evaluation in news.evaluations:
            shown.say(evaluation_text(evaluation))
        shown.show(watched, is_new=bool(news.rows))
        if watched.state != "running":
            return watched
        is_first = False
        time.sleep(SECONDS)


def _tell_end(watched: Watched) -> None:
    """How the run ended; that is no failure of this command."""
    from mpcli.cli.result import show_summary

    path, result = watched.run.path, watched.result
    if not path.is_dir():
        write(visible(f"{path}: is gone"))
        return
    if result is None:
        step = f"after step {watched.last.step:,}" if watched.last else "before step 1"
        write(visible(f"{path}: {_ENDS[watched.state]} {step}"))
        if watched.state == "killed":
            write(visible(f"`mptrain run --resume {path}` goes on"), sys.stderr)
        return
    show_summary(result, path)
    show_problems(
        Problem(p["message"], p["hint"], p["path"] or "", severity=p["severity"])
        for p in result.problems
    )


_ENDS = {
    "recorded": "the recording ended",
    "killed": "was killed",
    "unreadable": "its result.json cannot be read; it ended",
}
