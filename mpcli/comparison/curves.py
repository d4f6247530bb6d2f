"""The course of runs: their losses beside each other, their skips and loss scales."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpcli.rundir import RunDirectory

TENTHS = 10
MAX_STEP = 10**12
"""Rows that say more are damaged."""


@dataclass(frozen=True)
class Curve:
    """The steps of a run as columns.

    Attributes:
        length: steps that it was planned to have, or has.
    """

    step: NDArray[np.int64]
    loss: NDArray[np.float64]
    scale: NDArray[np.float64]
    applied: NDArray[np.bool_]
    samples_per_second: NDArray[np.float64]
    length: int

    @property
    def skipped(self) -> int:
        """Steps that were not applied."""
        return int((~self.applied).sum())


_NONE = np.array([], np.float64)
NO_CURVE = Curve(np.array([], np.int64), _NONE, _NONE, np.array([], np.bool_), _NONE, 0)
"""Of a run without steps."""


def read_curve(run: RunDirectory, planned: int | None) -> Curve:
    """All steps of a run that can be read."""
    steps, applied = array("q"), array("b")
    numbers = {name: array("d") for name in ("loss", "scale", "samples_per_second")}
    for row in run.steps():
        if 0 < row.step <= MAX_STEP:
            steps.append(row.step)
            applied.append(row.applied)
            for name, column in numbers.items():
                column.append(getattr(row, name))
    columns = {name: np.array(column, np.float64) for name, column in numbers.items()}
    step = np.array(steps, np.int64)
    last = int(step.max()) if len(step) else 0
    # What a resume made longer, or a damaged plan, is not shorter than what was done.
    length = max(last, planned) if planned and planned <= MAX_STEP else last
    return Curve(step, applied=np.array(applied, np.bool_), length=length, **columns)


def tenths(curves: Sequence[Curve]) -> tuple[float | None, ...]:
    """The mean loss in each tenth of the run, of all runs; None where there is no step."""
    sums, counts = np.zeros(TENTHS), np.zeros(TENTHS)
    for curve in curves:
        if not len(curve.step):
            continue
        places = (TENTHS * curve.step - 1) // curve.length
        with np.errstate(all="ignore"):
            found = np.bincount(places, curve.loss, TENTHS)
            number = np.bincount(places, minlength=TENTHS)
            sums += np.where(number > 0, found / np.maximum(number, 1), 0.0)
        counts += number > 0
    return tuple(
        float(total / count) if count else None for total, count in zip(sums, counts, strict=True)
    )


@dataclass(frozen=True)
class Apart:
    """How far two curves are from each other.

    Attributes:
        common: steps that both have.
        first: step from which on they differ at all; None: they are the same.
        step: at which they differ most, with the losses of both there; None without a common one
            where both are finite.
    """

    common: int
    first: int | None
    step: int | None
    loss: float | None = None
    reference: float | None = None


def apart(curves: Sequence[Curve], reference: Sequence[Curve]) -> Apart:
    """The mean curve of some runs beside that of others."""
    ours, theirs = _mean(curves), _mean(reference)
    common, mine, other = np.intersect1d(
        ours[0], theirs[0], assume_unique=True, return_indices=True
    )
    a, b = ours[1][mine], theirs[1][other]
    differ = common[~((a == b) | (np.isnan(a) & np.isnan(b)))]
    first = int(differ[0]) if len(differ) else None
    with np.errstate(all="ignore"):
        distances = np.abs(a - b)
    finite = np.isfinite(distances)
    if not finite.any():
        return Apart(len(common), first, None)
    most = int(np.argmax(np.where(finite, distances, -1.0)))
    return Apart(len(common), first, int(common[most]), float(a[most]), float(b[most]))


def _mean(curves: Sequence[Curve]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """By step, of the runs that have it."""
    steps, places = np.unique(np.concatenate([c.step for c in curves]), return_inverse=True)
    losses = np.concatenate([curve.loss for curve in curves])
    return steps, np.bincount(places, losses, len(steps)) / np.bincount(
        places, minlength=len(steps)
    )
