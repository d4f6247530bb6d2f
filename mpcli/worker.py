"""One of the processes that `mptrain run` starts: `python -m mpcli.worker RUN_DIR`.

It is told by its environment which rank it is (as torchrun's agent does), and gets all else from
the run directory.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mpcli import signals
from mpcli.recipe.errors import Exit, UserError
from mpcli.rundir import RunDirectory

if TYPE_CHECKING:
    from mpcli.launch import Ending
    from mpcli.trainer import Display


def main() -> NoReturn:
    """Take part in a run; exit code 0 where all ranks end together, whatever that end is."""
    signals.install(_leave)
    parser = argparse.ArgumentParser(prog="mpcli.worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--launcher", type=int, required=True, help="its process id")
    parser.add_argument("--plugin")
    options = parser.parse_args()
    _end_with(options.launcher)
    run = RunDirectory.join(options.run, options.attempt, int(os.environ["RANK"]))
    try:
        run.begin_heartbeat()
        _separate_output(run)
        ending = _work(run, options.plugin)
        code = Exit.DONE if run.ended else ending.exit_code
    except Exception as error:
        code = _failed(run, error)
    if code == Exit.DONE:
        atexit._run_exitfuncs()  # temporary folders, say; what is broken may wait for ever
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a terminal that was closed
            stream.flush()
    os._exit(code)  # nothing that is still going on in a library is waited for


def _leave(preempted: bool) -> NoReturn:
    """End at once, before there is anything to save: the launcher tells it by the exit code."""
    os._exit(Exit.PREEMPTED if preempted else Exit.INTERRUPTED)


def _end_with(launcher: int) -> None:
    """Be killed when the launcher is gone, however it ended."""
    signals.end_with_parent()
    if os.getppid() != launcher:
        os._exit(Exit.DISTRIBUTED)


def _separate_output(run: RunDirectory) -> None:
    """Rank 0 writes to the terminal's stderr, others to their logs; stdout is the launcher's."""
    target = 2
    if run.rank:
        target = os.open(run.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(target, 2)
    os.dup2(target, 1)
    # Python's own was made for another file: whether one can seek in it, for instance.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115


def _failed(run: RunDirectory, error: Exception) -> Exit:
    """Tell of what stood in the way of taking part, or of telling so; the exit code."""
    from mpcli.launch import ended_by
    from mpcli.member import fail

    ending = ended_by(error)
    try:
        fail(run, ending)
    except UserError:
        sys.stderr.write(f"rank {run.rank}: {error}\n")
    return ending.exit_code


def _work(run: RunDirectory, plugin_path: str | None) -> Ending:
    from mpcli.cli.console import display, prepare_streams

    prepare_streams()
    from mpcli.cli.plugin import plugin_of_run
    from mpcli.launch import ended_by, reported
    from mpcli.member import Silent, enter, fail, take_part
    from mpcli.position import position
    from mpcli.ranks import leave
    from mpcli.recipe.load import load_recipe

    shown: Display = Silent() if run.rank else display()
    with reported(run, shown):
        recipe = None
        try:
            plugin = plugin_of_run(run, plugin_path)
            recipe = load_recipe(run.recipe_path, plugin=plugin).recipe
            plan, place = run.plan(), position(os.environ)
            assert place is not None
            ranks = enter(place, recipe, plan, plugin)
        except Exception as error:
            ending = ended_by(error, recipe)
            fail(run, ending)
            return ending
        with signals.held():
            ending = take_part(run, recipe, shown, ranks)
            if run.ended:
                leave()
        return ending


if __name__ == "__main__":
    main()
