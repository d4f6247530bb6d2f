"""The training's side of its trackers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from mpcli.progress import Progress
from mpcli.recipe.errors import Problem
from mpcli.recipe.recipe import Recipe
from mpcli.records import EvalRecord, Plan, Status, StepRecord
from mpcli.rundir import RunDirectory
from mpcli.signals import asked, blocked
from mpcli.trainer import Display

logger = logging.getLogger(__name__)

_PATIENCE, _SHORT_PATIENCE = 30.0, 5.0  # seconds, that the end of a run may take longer
_TIME_TO_REACH = 30.0  # seconds from its start, that one which reached nothing yet has for that
_PERIOD = 0.05
_COMMAND = (sys.executable, "-P", "-m", "mpcli.trackers")
_HINT = "the run is not affected: steps.jsonl and evals.jsonl have everything"


class Tracked:
    """A display, beside which trackers follow the run.

    Each is a process that reads the rows from the disk. Nothing here waits for one before the
    training is over, and then not for long. A process and no thread: what a tracker computes would
    hold the interpreter's lock, which every operation of a step needs.

    Args:
        progress: of the run; is told what went wrong with a tracker, once.
    """

    def __init__(self, display: Display, run: RunDirectory, progress: Progress) -> None:
        self._display, self._run, self._progress = display, run, progress
        self._processes: list[_Process] = []

    def __enter__(self) -> Tracked:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.leave()

    def start(self, plan: Plan, recipe: Recipe) -> None:
        """The training begins; so do, beside rank 0, the trackers."""
        self._display.start(plan, recipe)
        for name in () if self._run.rank else recipe.output.trackers:
            try:
                process = _Process(name, self._run, self._progress.attempted)
            except OSError as error:
                self._warn(name, str(error))
            else:
                self._processes.append(process)

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """Rows for the display; and time to hear of trackers."""
        self._display.steps(rows)
        self._listen()

    def evaluated(self, row: EvalRecord) -> None:
        """A row for the display."""
        self._display.evaluated(row)

    def message(self, text: str) -> None:
        """A message for the display."""
        self._display.message(text)

    def close(self) -> None:
        """Close the display."""
        self._display.close()

    def finish(self, status: Status) -> None:
        """Tell trackers how the training ended, and give them some time to write what is left.

        Someone who stops a run waits for its end: they get less then, also when the signal comes
        in the middle of this. So do those that had time and never reached anything.
        """
        for process in self._processes:
            process.tell(status)
        began = time.monotonic()
        most = _PATIENCE if status in ("done", "diverged") else _SHORT_PATIENCE
        patience = most
        with contextlib.suppress(KeyboardInterrupt):  # the second: the result is not written yet
            while left := [process for process in self._processes if process.runs]:
                self._listen()
                most = min(most, _SHORT_PATIENCE) if asked() else most
                patience = min(most, max(process.patience(began) for process in left))
                if time.monotonic() > began + patience:
                    break
                time.sleep(_PERIOD)
        self._listen()
        for process in self._processes:
            if process.runs:
                self._warn(process.name, f"was not ready {patience:.3g} s after the training")
            elif process.code:
                self._warn(process.name, f"its process ended with {process.code}")
            process.leave(kill=True)

    def _listen(self) -> None:
        for process in self._processes:
            for severity, text in process.said():
                if severity == "warning":
                    self._warn(process.name, text)
                elif severity == "reached":
                    process.reached = True
                else:
                    logger.info("%s", text)
                    self._display.message(text)

    def _warn(self, name: str, what: str) -> None:
        """Of each tracker one warning, the first: others would follow from that."""
        told = f"tracker {name}: "
        if not any(problem.what.startswith(told) for problem in self._progress.warnings):
            problem = Problem(told + what, _HINT, "output.trackers", severity="warning")
            self._progress.warn(problem)


class _Process:
    """One tracker's process; see `__main__.py` for what is said to it and by it."""

    def __init__(self, name: str, run: RunDirectory, step: int) -> None:
        self.name, self.reached, self._began = name, False, time.monotonic()
        arguments = (name, str(run.path), str(run.attempt), str(step))
        with blocked():  # signals to the process group are the training's business
            self._process = subprocess.Popen(
                [*_COMMAND, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        assert self._process.stdin and self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._text = b""

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def code(self) -> int | None:
        """Its exit code."""
        return self._process.returncode

    def patience(self, over: float) -> float:
        """How many seconds after the training, which is `over` then, it is worth waiting for."""
        if self.reached:
            return _PATIENCE
        return max(_SHORT_PATIENCE, self._began + _TIME_TO_REACH - over)

    def tell(self, status: Status) -> None:
        """Say how the training ended."""
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._input.write(status.encode())

    def said(self) -> list[tuple[str, str]]:
        """What it has said since this was asked: severity and text."""
        self._text += self._output.read() or b""
        *lines, self._text = self._text.split(b"\n")
        return [found for line in lines if (found := _message(line))]

    def leave(self, *, kill: bool = False) -> None:
        """Close the pipes: where it was told nothing before, the training is gone."""
        if kill:
            self._process.kill()
            self._process.wait()
        for pipe in (self._input, self._output):
            pipe.close()


def _message(line: bytes) -> tuple[str, str] | None:
    """None for what is none: Python prints before `__main__.py` begins, where it is told to."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match found:
        case [str(severity), str(text)]:
            return severity, text
    return None
