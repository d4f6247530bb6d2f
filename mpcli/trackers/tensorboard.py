"""TensorBoard event files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mpcli.records import EvalRecord, StepRecord
from mpcli.trackers.base import About, points


class TensorBoard:
    """Writes events without torch's writer, which has a thread of its own and imports torch."""

    def __init__(self, about: About, say: Callable[[str], None]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session, self._summary = Event, SessionLog, Summary
        self._writer = RecordWriter
        self._about = about

    def begin(self) -> None:
        """A new file; what older ones hold of later steps is hidden by what this one begins with.

        TensorBoard reads files in the order of their names, which begin with the time.
        """
        now = time.time()
        path = self._about.folder / f"events.out.tfevents.{time.time_ns()}"
        self._records = self._writer(path.open("wb"))
        self._write(self._event(wall_time=now, file_version="brain.Event:2"))
        start = self._session(status=self._session.START)
        self._write(self._event(wall_time=now, step=self._about.step + 1, session_log=start))
        self._records.flush()

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """One event per row."""
        for row in rows:
            self._points(row)
        self._records.flush()

    def evaluated(self, row: EvalRecord) -> None:
        """One event."""
        self._points(row)
        self._records.flush()

    def finish(self, status: str) -> None:
        """Close the file."""
        self._records.close()

    def _points(self, row: StepRecord | EvalRecord) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value) for name, value in points(row).items()
        ]
        summary = self._summary(value=values)
        self._write(self._event(wall_time=time.time(), step=row.step, summary=summary))

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # type: ignore[attr-defined]
