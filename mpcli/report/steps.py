"""The steps of a run as columns of numbers, and the few of them that its curves need."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpcli.report.thin import Numbers, kept
from mpcli.rundir import RunDirectory

COLUMNS = (
    "step", "attempt", "loss", "lr", "grad_norm", "scale", "applied", "samples_per_second",
    "memory_allocated_bytes", "memory_peak_bytes",
)  # fmt: skip
_LARGEST = 2.0**53  # steps are counted exactly up to there
_CURVES = tuple(name for name in COLUMNS if name not in ("step", "attempt", "applied"))


@dataclass(frozen=True)
class Steps:
    """Rows of `steps.jsonl` in the order of their steps, by column."""

    columns: dict[str, Numbers]

    def __len__(self) -> int:
        return len(self["step"])

    def __getitem__(self, name: str) -> Numbers:
        return self.columns[name]

    def at(self, places: NDArray[np.bool_] | NDArray[np.intp]) -> Steps:
        """Some of them, by index or by what is true of each."""
        return Steps({name: column[places] for name, column in self.columns.items()})

    @property
    def skipped(self) -> Steps:
        """Those that changed no weight."""
        return self.at(self["applied"] == 0)

    @property
    def resumed(self) -> Numbers:
        """First steps of later attempts."""
        later = np.flatnonzero(np.diff(self["attempt"]) > 0) + 1
        return self["step"][later]

    def thinned(self, buckets: int) -> Steps:
        """For a chart; every skip and every value that is not finite stays."""
        always = (self["applied"] == 0) | ~np.isfinite(self["loss"])
        always[1:] |= np.diff(self["attempt"]) != 0
        return self.at(kept([self[name] for name in _CURVES], always, buckets))


def read_steps(run: RunDirectory, unread: Counter[str]) -> Steps:
    """All rows that can be read; of a step that is there twice, the later one."""
    columns = {name: array("d") for name in COLUMNS}
    for row in run.steps(unread):
        try:
            values = [float(getattr(row, name)) for name in COLUMNS]
        except OverflowError:
            values = [_LARGEST]
        if not 1 <= values[0] < _LARGEST:
            unread["steps.jsonl"] += 1
            continue
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    found = Steps({name: np.array(column) for name, column in columns.items()})
    order = np.argsort(found["step"], kind="stable")
    last = np.append(np.diff(found["step"][order]) > 0, True)[: len(order)]
    return found.at(order[last])
