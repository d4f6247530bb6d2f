"""A run that another process writes, as it goes on."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpcli.recipe.errors import UserError, user_error
from mpcli.recipe.load import recorded_values
from mpcli.records import EvalRecord, Plan, Result, StepRecord
from mpcli.rundir import RunDirectory
from mpcli.rundir.rows import Row, Tail
from mpcli.states import State, state_of

RECENT = 20
"""Rows whose median speed tells how long the rest will take."""
_ROWS = 1000  # that are in memory at a time
_CELLS = 120
_MAX_STEP = 10**12  # rows that say more are damaged


def begun(path: Path) -> RunDirectory | None:
    """The run at `path`; None where there is none yet.

    Raises:
        UserError: exit 2, there is something else.
    """
    try:
        # `latest` will be another run's, while this one is watched.
        is_link = path.is_symlink()
        return RunDirectory.read(Path(os.path.relpath(path.resolve())) if is_link else path)
    except UserError:
        with contextlib.suppress(OSError):
            if not (path.parent.is_dir() or path.is_symlink()):
                hint = "a run that is not there yet is waited for where the folder for it is"
                raise user_error(f"{path}: there is no folder {path.parent}", hint) from None
            is_empty = path.is_dir() and not any(path.iterdir())
            if is_empty or not path.exists() or RunDirectory(path).is_held():  # it is being made
                return None
        raise


class Course:
    """A number over all steps so far, in bounded memory: means of so many steps each."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1  # steps in a mean
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """The next one."""
        self._open.append(value)
        if len(self._open) < self._each:
            return
        self._means.append(_mean(self._open))
        self._open = []
        if len(self._means) == 2 * _CELLS:
            self._means = _pairs(self._means)
            self._each *= 2

    def means(self, number: int) -> list[float]:
        """At most so many, of equal shares of the steps."""
        means = [*self._means, _mean(self._open)] if self._open else self._means
        while len(means) > number:
            means = _pairs(means)
        return means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pairs(values: Sequence[float]) -> list[float]:
    return [_mean(values[place : place + 2]) for place in range(0, len(values), 2)]


@dataclass
class News:
    """What came since the last look."""

    attempt: tuple[int, tuple[str, ...]] | None = None  # a new one, and why, in words
    rows: int = 0
    evaluations: list[EvalRecord] = field(default_factory=list)


class Watched:
    """A run, as far as it is known.

    Attributes:
        state: `running` until it ends.
        result: how it ended, where it says so.
        last: the newest step.
        skipped: steps that were not applied.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.foreign = run.foreign()
        self.values = self._recipe_values()
        self.state: State = "running"
        self.result: Result | None = None
        self.plan: Plan | None = None
        self._told: set[tuple[int, int]] = set()  # evaluations: attempt, step
        self._begin()

    def _recipe_values(self) -> dict[str, Any]:
        with contextlib.suppress(UserError):
            if not self.foreign:
                return recorded_values(self.run.recipe_path)
        return {}

    def _begin(self) -> None:
        """From the first row on."""
        self.last: StepRecord | None = None
        self.skipped = 0
        self.losses = Course()
        self._speeds: deque[float] = deque(maxlen=RECENT)
        self._steps = self.run.new_steps()
        self._evaluations = self.run.new_evaluations()

    def look(self) -> News:
        """Read what is new; the state is that of before, so that the last rows are read too."""
        news = News()
        self.state, self.result = state_of(self.run)
        newest = self.run.newest_attempt()
        if newest.attempt != self.run.attempt:
            self.run, self.plan = newest, None
            self.values = self._recipe_values()
            news.attempt = newest.attempt, newest.changes()
            self._begin()
        if self._steps.was_cut() or self._evaluations.was_cut():  # a resume takes rows back
            self._begin()
        if self.plan is None:
            with contextlib.suppress(OSError, ValueError):
                self.plan = self.run.plan()
        for row in _unread(self._steps):
            if row.step <= _MAX_STEP:
                news.rows += 1
                self.last = row
                self.skipped += not row.applied
                self.losses.add(row.loss)
                self._speeds.append(row.samples_per_second)
        for evaluation in _unread(self._evaluations):
            known = evaluation.attempt, evaluation.step
            if known not in self._told:
                self._told.add(known)
                news.evaluations.append(evaluation)
        return news

    @property
    def steps(self) -> int | None:
        """Planned."""
        return self.plan.steps if self.plan and self.plan.steps <= _MAX_STEP else None

    @property
    def speed(self) -> float:
        """Samples per second lately; 0 where nobody knows."""
        found = statistics.median(self._speeds) if self._speeds else 0.0
        return found if math.isfinite(found) else 0.0

    @property
    def seconds_left(self) -> float | None:
        """For the rest of the steps, at the present speed; None where nobody knows."""
        train = self.values.get("train")
        batch = train.get("global_batch_size") if isinstance(train, dict) else None
        if not (isinstance(batch, int) and batch <= _MAX_STEP and self.steps and self.last):
            return None
        return batch * max(0, self.steps - self.last.step) / self.speed if self.speed > 0 else None


def _unread(tail: Tail[Row]) -> Iterator[Row]:
    while rows := tail.read(_ROWS):
        tail.advance()
        yield from rows
