"""What a tracker is, and what it is told of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mpcli.records import EvalRecord, StepRecord

T = TypeVar("T")


@dataclass(frozen=True)
class About:
    """A run, as its trackers see it.

    Attributes:
        name: of the recipe: what groups runs (a project, an experiment).
        run: its own name, which is that of its folder.
        recipe: resolved.
        folder: where the tracker writes, unless its own environment variables say otherwise.
        identity: what `begin` returned in an attempt before this one; None in the first.
        step: the last one whose points stay; an earlier attempt may have written later ones.
    """

    name: str
    run: str
    recipe: dict[str, Any]
    folder: Path
    identity: str | None
    step: int


class Tracker(Protocol):
    """One tracker of one run. Making it imports its package; whatever is raised is tried again.

    Args:
        say: tells the person something that is no problem.
    """

    def __init__(self, about: About, say: Callable[[str], None]) -> None: ...

    def begin(self) -> str | None:
        """Begin the run, or go on with it. Returns what names it there, where it needs a name."""

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """Points of attempted steps, in order."""

    def evaluated(self, row: EvalRecord) -> None:
        """Points of one evaluation."""

    def finish(self, status: str) -> None:
        """The attempt is over: `done`, `diverged`, `preempted`, `interrupted`, `failed`, `killed`.

        `killed`: the training is gone and said nothing.
        """


def points(row: StepRecord | EvalRecord) -> dict[str, float]:
    """The quantities of a row, by the names that all trackers show them under."""
    if isinstance(row, EvalRecord):
        return {f"eval/{name}": value for name, value in row.metrics.items()}
    values = row.model_dump(exclude={"step", "attempt"})
    return {f"train/{name}": float(value) for name, value in values.items()}


def batches(items: Iterable[T], most: int) -> Iterator[list[T]]:
    """All items, at most so many at a time."""
    rest = iter(items)
    while some := list(islice(rest, most)):
        yield some
