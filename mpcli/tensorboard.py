"""TensorBoard event files of a run (`output.tensorboard: true`, extra `tensorboard`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from mpcli.records import EvalRecord, StepRecord
from mpcli.rundir import storage_errors
from mpcli.signals import uninterrupted


class TensorBoard:
    """Writes every step and evaluation as scalars, as they are recorded; an OSError is raised late.

    Args:
        steps: taken before; points of later steps, which an earlier attempt wrote, are hidden.
    """

    def __init__(self, path: Path, steps: int = 0) -> None:
        with uninterrupted():
            from torch.utils.tensorboard import SummaryWriter

        with storage_errors(path):
            self._writer = SummaryWriter(str(path), purge_step=steps + 1 if steps else None)
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_ended

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """One point per row and quantity; `train/applied` is 1 or 0."""
        for row in rows:
            self._scalars("train", row.model_dump(exclude={"step", "attempt"}), row.step)

    def evaluated(self, row: EvalRecord) -> None:
        """Metrics of one evaluation."""
        self._scalars("eval", row.metrics, row.step)

    def close(self) -> None:
        """Write what is buffered."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _thread_ended(self, about: threading.ExceptHookArgs) -> None:
        """An OSError of the writer's thread is raised again where the next point is added."""
        if not isinstance(about.exc_value, OSError):
            self._excepthook(about)

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)
