"""TensorBoard event files of a run (`output.tensorboard: true`, extra `tensorboard`)."""

from __future__ import annotations

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

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """One point per row and quantity; `train/applied` is 1 or 0."""
        for row in rows:
            self._scalars("train", row.model_dump(exclude={"step", "attempt"}), row.step)

    def evaluated(self, row: EvalRecord) -> None:
        """Metrics of one evaluation."""
        self._scalars("eval", row.metrics, row.step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)
