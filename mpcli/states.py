"""What a run is at a glance: its state, and the numbers that its other facts come down to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mpcli.recipe.errors import UserError
from mpcli.recipe.load import recorded_values
from mpcli.recipe.precision import Mode
from mpcli.records import Result
from mpcli.rundir import RunDirectory, num_bytes

State = Literal[
    "running",
    "done",
    "diverged",
    "failed",
    "killed",
    "preempted",
    "interrupted",
    "recorded",
    "unreadable",
]
STATES: tuple[State, ...] = get_args(State)
METRICS = ("accuracy", "f1", "masked_accuracy")
"""What a run is judged by: the first that its evaluations have, more is better; else the loss."""
RECENT = 50
"""Steps whose mean is the training loss of a run without a result, as of one with it."""

Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Metric:
    """What a run is judged by."""

    split: Literal["eval", "train"]
    name: str
    value: float

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts the best first; values of one kind stand together."""
        kinds = [("eval", name) for name in (*METRICS, "loss")]
        kind = kinds.index((self.split, self.name)) if self.split == "eval" else len(kinds)
        value = self.value if self.name == "loss" else -self.value
        return kind, math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Overview:
    """A run at a glance. What is not known is None.

    Attributes:
        why: how it ended, or why it cannot be read.
        steps: attempted.
        wall_seconds: that it took; without a result those of its newest attempt, up to its newest
            step or, while it runs, up to now.
        size_bytes: of all of its files.
        started: in seconds since 1970.
    """

    path: Path
    state: State
    size_bytes: int
    why: str | None = None
    name: str | None = None
    mode: str | None = None
    attempt: int | None = None
    steps: int | None = None
    planned_steps: int | None = None
    metric: Metric | None = None
    wall_seconds: float | None = None
    started: float | None = None


def overview(path: Path) -> Overview:
    """What the run directory at `path` says, whatever is in it."""
    found = _overview(path)
    # A file that is written anew may be gone for a moment while it is looked at.
    return _overview(path) if found.state == "unreadable" else found


def _overview(path: Path) -> Overview:
    size = num_bytes(path)
    try:
        run = RunDirectory.read(path)
        state, result = state_of(run)
        values = {} if run.foreign() else recorded_values(run.recipe_path)
    except UserError as error:
        what = error.problems[0].what.removeprefix(f"{path}: ")
        return Overview(path, "unreadable", size, what)
    except OSError as error:
        return Overview(path, "unreadable", size, error.strerror)
    name = values.get("name")
    why = result.reason if result else None
    last = run.last_steps(1)
    return Overview(
        path=path,
        state=state,
        size_bytes=size,
        why="result.json cannot be read" if state == "unreadable" else why,
        name=name if isinstance(name, str) else None,
        mode=_mode(values),
        attempt=run.attempt,
        steps=result.steps_attempted if result else last[-1].step if last else 0,
        planned_steps=planned_steps(run),
        metric=judged_by(metrics_of(run, result)),
        wall_seconds=result.wall_seconds if result else _seconds(run, state),
        started=run.began(1),
    )


def state_of(run: RunDirectory) -> tuple[State, Result | None]:
    """Whether a run goes on, or how it ended."""
    # A resume takes the lock before it removes the result, and an end writes the result before it
    # gives the lock back: who finds neither has looked in between, and looks once more.
    for _ in range(2):
        if run.is_held():
            return "running", None
        if run.foreign():
            return "recorded", None
        if result := run.result():
            return result.status, result
    return ("unreadable" if run.has_result() else "killed"), None


def metrics_of(run: RunDirectory, result: Result | None) -> Metrics:
    """The newest evaluation and the training loss, as a result has them."""
    if result:
        return result.metrics
    found: dict[str, dict[str, float]] = {}
    if losses := [row.loss for row in run.last_steps(RECENT)]:
        found["train"] = {"loss": sum(losses) / len(losses)}
    if evaluation := run.last_evaluation():
        found["eval"] = evaluation.metrics
    return found


def judged_by(metrics: Metrics) -> Metric | None:
    """The metric that counts, of those there are."""
    evaluation = metrics.get("eval", {})
    for name in (*METRICS, "loss"):
        if name in evaluation:
            return Metric("eval", name, evaluation[name])
    loss = metrics.get("train", {}).get("loss")
    return None if loss is None else Metric("train", "loss", loss)


def planned_steps(run: RunDirectory) -> int | None:
    """Of the newest attempt, as far as it has a plan."""
    try:
        return run.plan().steps
    except (OSError, ValueError):
        return None


def _mode(values: Mapping[str, Any]) -> str | None:
    precision = values.get("precision")
    mode = precision.get("mode") if isinstance(precision, dict) else None
    return mode if mode in get_args(Mode) else None


def _seconds(run: RunDirectory, state: State) -> float | None:
    began = run.began()
    ended = time.time() if state == "running" else run.last_written()
    return max(0.0, ended - began) if began is not None and ended is not None else None
