"""The processes of a sweep: one for each trial, forked from a server that has torch imported."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpcli import signals
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recipe.load import LoadedRecipe
from mpcli.recipe.recipe import Recipe
from mpcli.sweep.cells import Cell
from mpcli.sweep.folder import SweepFolder
from mpcli.sweep.results import TrialResult

if TYPE_CHECKING:
    from mpcli.sweep.study import Study

LOOK = 0.2
"""Seconds between two looks at the signals."""
POLL = 1.0
"""Seconds between two looks at the study, which other processes may change."""
MAX_BARREN = 3
"""Processes in a row that may die before they have taken a cell."""

_GOES_ON = "the same command goes on with the sweep"


def check_installed() -> None:
    """See that the packages of the extra are there.

    Raises:
        UserError: exit 3.
    """
    for package in ("optuna", "plotext"):
        if importlib.util.find_spec(package) is None:
            raise user_error(
                f"sweeps need {package}, which is not installed",
                'pip install "mptrain[sweep]"',
                exit_code=Exit.ENVIRONMENT,
            )


def start_server() -> None:
    """Begin to import what trials need, beside whatever the caller does next.

    The server leaves with the process that started it, and hears no signal before that.
    """
    multiprocessing.set_forkserver_preload(["mpcli.sweep.server", "mpcli.sweep.trial"])
    with _safe_path():
        resource_tracker.ensure_running()  # which would let signals through
        with signals.blocked():
            forkserver.ensure_running()


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Python's own processes would import from the folder that the command is started in."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def run_sweep(
    folder: Path,
    recipe: LoadedRecipe,
    cells: Sequence[Cell],
    *,
    kind: str,
    asked: Mapping[str, Any],
    storage: str | None,
    jobs: int,
    tell: Callable[[str], None],
) -> list[TrialResult]:
    """Run every cell that has not ended, together with other processes of the same sweep.

    May be called again with more cells.

    Args:
        recipe: of all trials, whose file has the plug-in if there is one.
        kind: of the sweep.
        asked: what a restart has to agree with, as JSON values.
        storage: URL of a database, for machines that have no folder in common.
        jobs: trials at the same time.
        tell: shows a line to the person.

    Returns:
        of every cell, in their order.

    Raises:
        UserError: exit 2, the folder holds something else; 3, the database cannot be used; 4, the
            study is damaged; 7, something cannot be written; 75 and 130, ended by a signal.
    """
    check_installed()
    about = (sweep := SweepFolder(folder)).prepare(recipe, kind, asked)
    from mpcli.sweep import study as studies

    beats = studies.HEARTBEAT, studies.GRACE
    plugin = (recipe.plugin.file, recipe.plugin.sha256) if recipe.plugin else None
    threads = max(1, _cpus() // jobs)
    work = _Work(sweep, about.name, storage, beats, kind, tuple(cells), plugin, threads)
    with signals.handled(), signals.held():
        study = work.study()
        study.revive(cells)
        _Jobs(work, study, recipe.recipe, jobs, tell).run()
        standings = study.look(cells)
        return [study.result(cell, standings[cell.name]) for cell in cells]


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus(recipe: Recipe) -> list[str]:
    """Those that trials are given one each of; none where a run itself takes several."""
    from mpcli.machine import detect_machine

    engine = recipe.engine
    if engine.kind != "local" or engine.device == "cpu":
        return []
    number = len(detect_machine().cuda_devices)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:number] if visible else [str(index) for index in range(number)]


@dataclass(frozen=True)
class _Work:
    """What a process needs to know to run trials of a sweep."""

    folder: SweepFolder
    name: str
    url: str | None
    beats: tuple[int, int]
    kind: str
    cells: tuple[Cell, ...]
    plugin: tuple[str, str] | None  # its file and SHA-256
    threads: int
    gpu: str | None = None

    def study(self) -> Study:
        """As this process sees it."""
        from mpcli.sweep.study import Study

        heartbeat, grace = self.beats
        return Study(self.folder, self.name, self.url, heartbeat=heartbeat, grace=grace)


class _Job:
    """A process that takes a cell and runs it.

    Attributes:
        trial_id: of the cell that it has taken; None before.
        error: why it could not go on, and the sweep cannot either.
    """

    def __init__(self, work: _Work) -> None:
        self.trial_id: int | None = None
        self.error: Exception | None = None
        self._told, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("forkserver")
        self.process: ForkServerProcess = context.Process(target=_process, args=(work, sender))
        start_server()  # again, if it was killed
        self.process.start()
        sender.close()

    def listen(self) -> None:
        """Read what it has told."""
        with contextlib.suppress(EOFError, OSError):  # it ended, perhaps in the middle of a word
            while self._told.poll():
                match self._told.recv():
                    case int(trial_id):
                        self.trial_id = trial_id
                    case error:
                        self.error = error

    def close(self) -> None:
        """Of one that has ended."""
        self.process.join()
        self.process.close()
        self._told.close()


class _Jobs:
    """As many processes as there may be, while there are cells to run."""

    def __init__(
        self,
        work: _Work,
        study: Study,
        recipe: Recipe,
        number: int,
        tell: Callable[[str], None],
    ) -> None:
        self._work = work
        self._study = study
        self._gpus = _gpus(recipe)
        self._tell = tell
        self._slots: list[_Job | None] = [None] * number
        self._over: set[str] = set()
        self._barren = 0
        self._error: Exception | None = None

    def run(self) -> None:
        """Until every cell is over, whoever runs it.

        Raises:
            UserError: by a signal, or what one of the processes cannot go on with; the others
                have left their runs to be gone on with.
        """
        self._news(silent=True)  # of those that had ended before
        try:
            while self._running() or len(self._over) < len(self._work.cells):
                if not self._stop:
                    self._start()
                elif not self._running():
                    raise self._stop
                self._wait()
                self._study.revive(self._work.cells)
                self._news()
        finally:
            self._kill()

    @property
    def _stop(self) -> Exception | None:
        """Why nothing more is begun."""
        if (number := signals.asked()) is None:
            return self._error
        if number == signal.SIGTERM:
            return user_error("stopped by SIGTERM", _GOES_ON, exit_code=Exit.PREEMPTED)
        return user_error("interrupted", _GOES_ON, exit_code=Exit.INTERRUPTED)

    def _running(self) -> list[_Job]:
        return [job for job in self._slots if job]

    def _news(self, *, silent: bool = False) -> None:
        """Tell of the trials that have ended since the last time."""
        standings = self._study.look(self._work.cells)
        for cell in self._work.cells:
            standing = standings[cell.name]
            if standing.over and cell.name not in self._over:
                self._over.add(cell.name)
                if not silent:
                    about = _text(self._study.result(cell, standing))
                    number = f"{len(self._over)}/{len(self._work.cells)}"
                    self._tell(f"{number} {cell.label} seed {cell.seed}: {about}")

    def _start(self) -> None:
        """As many processes as there are cells that wait, and no process on its way to."""
        standings = self._study.look(self._work.cells).values()
        wanted = sum(standing.waiting for standing in standings)
        wanted -= sum(job.trial_id is None for job in self._running())
        for slot, job in enumerate(self._slots):
            if job is None and wanted > 0:
                gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
                self._slots[slot] = _Job(replace(self._work, gpu=gpu))
                wanted -= 1

    def _wait(self) -> None:
        """For a process to end, for a signal, or for other processes of the sweep."""
        until = time.monotonic() + POLL
        ended: list[Any] = []
        while not ended and time.monotonic() < until:
            running = self._running()
            if self._stop:
                for stopped in running:
                    stopped.process.terminate()  # again and again, which means no more than once
            ended = connection.wait([one.process.sentinel for one in running], timeout=LOOK)
            if self._stop and not running:
                return
        for slot, job in enumerate(self._slots):
            if job:
                job.listen()
                if job.process.sentinel in ended:
                    self._slots[slot] = None
                    self._ended(job)

    def _ended(self, job: _Job) -> None:
        """See why a process ended."""
        job.listen()
        code = job.process.exitcode
        job.close()
        self._error = self._error or job.error
        lost = bool(code) and not job.error and not self._stop
        if lost and job.trial_id is not None:
            self._study.died(job.trial_id)
        self._barren = self._barren + 1 if lost and job.trial_id is None else 0
        if self._barren == MAX_BARREN:
            what = f"the processes of the sweep die before they begin (exit code {code})"
            hint = f"the machine may be short of memory; {_GOES_ON}"
            self._error = user_error(what, hint, exit_code=Exit.ENVIRONMENT)
        if job.trial_id is None:
            time.sleep(LOOK)  # what it found taken may be free soon

    def _kill(self) -> None:
        for job in self._running():
            job.process.kill()
            job.close()
        self._slots.clear()


def _text(result: TrialResult) -> str:
    """How a trial ended, in a few words."""
    if result.status == "done" and result.loss is not None:
        return f"loss {result.loss:.4g}, skipped {result.skipped}"
    return f"{result.status}: {result.reason}" if result.reason else result.status


def _process(work: _Work, told: Connection) -> None:
    """Take a cell and run it: a process of its own."""
    os.setsid()  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signals.install()
    with signals.held():
        signals.unblock()
        try:
            code = _run(work, told)
        except UserError as error:
            told.send(error)
            code = error.exit_code
        except KeyboardInterrupt:
            code = Exit.INTERRUPTED
        except Exception:
            told.send(RuntimeError(f"in a process of the sweep:\n{traceback.format_exc()}"))
            code = Exit.BUG
        signals.ignore()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the modules of torch apart would take seconds


def _run(work: _Work, told: Connection) -> Exit:
    import torch

    from mpcli.recipe.plugin import load_plugin
    from mpcli.sweep.study import Lost
    from mpcli.sweep.trial import run_trial

    if work.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = work.gpu
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(work.threads)
    plugin = load_plugin(*work.plugin) if work.plugin else None
    claim = work.study().claim(work.cells)
    if claim is None:
        return Exit.DONE
    told.send(claim.trial_id)
    _print_to(work.folder.log_path(claim.cell))
    with contextlib.suppress(Lost):
        run_trial(claim, work.folder, work.kind, plugin)
    return Exit.DONE


def _print_to(path: Path) -> None:
    """What libraries print is no output of the sweep."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _end_with_parent() -> NoReturn:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
