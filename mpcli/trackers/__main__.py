"""One tracker of a run in a process of its own: reads the run's rows and passes them on.

`python -m mpcli.trackers NAME RUN ATTEMPT STEP`, where STEP is the last one whose rows stay.
Standard input says how the training ended, or that it is gone; standard output has what is said,
a JSON list a line: `warning` or `info`, and the text; `reached`, once, when rows were passed on.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mpcli.machine import without_secrets
from mpcli.records import TrackerState
from mpcli.rundir import RunDirectory
from mpcli.trackers.base import About, Tracker
from mpcli.trackers.mlflow import MLflow
from mpcli.trackers.tensorboard import TensorBoard
from mpcli.trackers.trackio import Trackio
from mpcli.trackers.wandb import WandB

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "trackio": Trackio,
}
_PERIOD = 1.0  # seconds from one look at the rows to the next
_RETRY, _LAST_RETRY = 10.0, 2.0  # after a failure; once the training is over
_MOST_LINES = 200  # passed on at once


class Follower:
    """Passes on to a tracker what it does not have yet of a run, and notes how far it got.

    Attributes:
        reached: whether the tracker has taken anything.
    """

    def __init__(
        self, run: RunDirectory, name: str, step: int, say: Callable[[str, str], None]
    ) -> None:
        self.reached = False
        self._run, self._name, self._say = run, name, say
        before = run.tracker_state(name)
        self._state = TrackerState(
            run=before.run, step=min(before.step, step), evaluated=min(before.evaluated, step)
        )
        recipe = yaml.safe_load(run.recipe_path.read_text("utf-8"))
        about = About(
            name=recipe["name"],
            run=run.path.resolve().name,
            recipe=recipe,
            folder=run.tracker_path(name).absolute(),
            identity=before.run,
            step=self._state.step,
        )
        self._tracker = TRACKERS[name](about, lambda text: say("info", text))
        self._begun = False
        self._steps, self._evaluations = run.new_steps(), run.new_evaluations()

    def go_on(self) -> None:
        """Pass on all that is there; after an exception this begins where that came.

        There may be more for as long as the training goes on: what was reached is said before.
        """
        if not self._begun:
            self._note(run=self._tracker.begin())
            self._begun = True
        while lines := self._steps.read(_MOST_LINES):
            if rows := [row for row in lines if row.step > self._state.step]:
                self._tracker.steps(rows)
                self._reach()
                self._note(step=rows[-1].step)
            self._steps.advance()
        while evaluations := self._evaluations.read(1):
            for evaluation in evaluations:
                if evaluation.step > self._state.evaluated:
                    self._tracker.evaluated(evaluation)
                    self._reach()
                    self._note(evaluated=evaluation.step)
            self._evaluations.advance()
        self._reach()

    def finish(self, status: str) -> None:
        """The attempt is over, and all of it is passed on."""
        self._tracker.finish(status)

    def _reach(self) -> None:
        if not self.reached:
            self.reached = True
            self._say("reached", "")

    def _note(self, **changes: Any) -> None:
        self._state = self._state.model_copy(update=changes)
        self._run.write_tracker_state(self._name, self._state)


def follow(run: RunDirectory, name: str, step: int, say: Callable[[str, str], None]) -> None:
    """Pass on the rows of a run until it is over.

    What fails is told once and tried again, as long as the training is there: the rows are on the
    disk, and none is lost while a tracker is out of reach. A training that is over does not wait
    for one that never was in reach.
    """
    follower, status, pause, told = None, None, 0.0, False
    while True:
        heard = _status(pause)
        status = status or heard
        try:
            follower = follower or Follower(run, name, step, say)
            follower.go_on()
            if status:
                follower.finish(status)
                return
            pause = _PERIOD
        except Exception as error:
            if not told:
                say("warning", reason(error))
            if heard == "killed" or (status and not (follower and follower.reached)):
                return
            told, pause = True, _LAST_RETRY if status else _RETRY


def reason(error: Exception) -> str:
    """What was raised, in one line that holds no secret."""
    first, *_ = str(error).splitlines() or [""]
    return without_secrets(f"{type(error).__name__}: {first}")[:300]  # cut, a secret is none


def _status(seconds: float) -> str | None:
    """How the training ended; None while it goes on, after a wait."""
    ready, _, _ = select.select([0], [], [], seconds)
    return (os.read(0, 100).decode() or "killed") if ready else None


def main() -> None:
    """The process."""
    name, path, attempt, step = sys.argv[1:]
    run = RunDirectory.join(Path(path), int(attempt), 0)
    said = os.fdopen(os.dup(1), "w")
    for stream in (1, 2):  # libraries print, and what they print may hold secrets
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def say(severity: str, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the training is gone
            print(json.dumps([severity, text]), file=said, flush=True)

    try:
        with run.tracking(name):
            if (
                RunDirectory.read(run.path).attempt == run.attempt
            ):  # not left over from a killed one
                follow(run, name, int(step), say)
    except Exception as error:
        say("warning", reason(error))
    os._exit(0)  # whatever threads and hooks a library has: it had its time to finish


if __name__ == "__main__":
    main()
