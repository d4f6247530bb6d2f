"""Trackio: SQLite below the run directory, or where its variables say."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from mpcli.records import EvalRecord, StepRecord
from mpcli.trackers.base import About, points


class Trackio:
    """The rows with their steps, and the recipe as the run's config."""

    def __init__(self, about: About, say: Callable[[str], None]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(about.folder.absolute()))
        import trackio

        self._init = trackio.init
        self._about = about

    def begin(self) -> str:
        """Trackio finds the run of an earlier attempt by its name."""
        name = self._about.identity or self._about.run
        self._run = self._init(
            project=self._about.name,
            name=name,
            config=self._about.recipe,
            resume="allow" if self._about.identity else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return name

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """One call each: Trackio sends them together."""
        for row in rows:
            self._log(row)

    def evaluated(self, row: EvalRecord) -> None:
        """One call."""
        self._log(row)

    def finish(self, status: str) -> None:
        """Wait until all is written."""
        self._run.finish()

    def _log(self, row: StepRecord | EvalRecord) -> None:
        self._run.log({"attempt": row.attempt, **points(row)}, step=row.step)
