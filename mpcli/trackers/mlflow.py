"""MLflow: a tracking server, or an SQLite file below the run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpcli.recipe.changes import leaves
from mpcli.records import EvalRecord, StepRecord
from mpcli.trackers.base import About, batches, points

if TYPE_CHECKING:
    from mlflow.entities import Metric

_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 6000  # of one call, as the API says
_STATUS = {"done": "FINISHED", "diverged": "FAILED", "failed": "FAILED"}


def database_url(database: Path) -> str:
    """Of an SQLite file, whatever is in the names of its folders."""
    from sqlalchemy import URL

    return str(URL.create("sqlite", database=str(database)))


class MLflow:
    """Metrics with their steps, the recipe as parameters, the status as a tag."""

    def __init__(self, about: About, say: Callable[[str], None]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the caller tries again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._param = Metric, Param
        self._about = about
        self._local = "MLFLOW_TRACKING_URI" not in os.environ
        self._client = MlflowClient(self._database() if self._local else None)
        self._run = about.identity or ""

    def _database(self) -> str:
        """Its tables take seconds to make; what a signal left of that is no database for ever."""
        from mlflow import MlflowClient

        path = self._about.folder.absolute() / "mlflow.db"
        if not path.exists():
            for left in path.parent.glob("mlflow.db.tmp*"):
                left.unlink()
            new = path.with_name("mlflow.db.tmp")
            MlflowClient(database_url(new)).search_experiments(max_results=1)
            new.rename(path)
        return database_url(path)

    def begin(self) -> str:
        """The run of an earlier attempt is a running one again; its parameters are as they were."""
        if self._about.identity:
            self._client.update_run(self._about.identity, status="RUNNING")
            return self._about.identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self._about.name)
        if found := self._client.get_experiment_by_name(name):
            experiment = found.experiment_id
        else:
            artifacts = (self._about.folder / "artifacts").absolute().as_uri()
            experiment = self._client.create_experiment(name, artifacts if self._local else None)
        if not self._run:  # else it was made before the parameters failed
            self._run = self._client.create_run(experiment, run_name=self._about.run).info.run_id
        params = (
            self._param(path, str(value)[:_LONGEST_PARAM])
            for path, value in leaves(self._about.recipe)
        )
        for some in batches(params, _MOST_PARAMS):
            self._client.log_batch(self._run, params=some)
        return self._run

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """As few calls as may be."""
        self._log(metric for row in rows for metric in self._metrics(row))

    def evaluated(self, row: EvalRecord) -> None:
        """One call."""
        self._log(self._metrics(row))

    def finish(self, status: str) -> None:
        """What was stopped is `KILLED`: MLflow has no word for what can go on."""
        self._client.set_tag(self._run, "mptrain.status", status)
        self._client.set_terminated(self._run, _STATUS.get(status, "KILLED"))

    def _metrics(self, row: StepRecord | EvalRecord) -> list[Metric]:
        now = int(1000 * time.time())
        return [self._metric(name, value, now, row.step) for name, value in points(row).items()]

    def _log(self, metrics: Iterable[Metric]) -> None:
        for some in batches(metrics, _MOST_METRICS):
            self._client.log_batch(self._run, metrics=some)
