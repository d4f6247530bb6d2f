"""Weights & Biases: its server, or offline files below the run directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from typing import Literal

from mpcli.records import EvalRecord, StepRecord
from mpcli.trackers.base import About, points


class WandB:
    """The rows as history, with `step` as their axis, and the recipe as the run's config.

    It is not told the command line or anything of Git, which may hold secrets, nor the code.
    """

    def __init__(self, about: About, say: Callable[[str], None]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._init, self._settings = wandb.init, wandb.Settings
        self._about = about
        self._mode: Literal["offline"] | None = None
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
            self._mode = "offline"
            say("wandb: nobody is logged in, so the run is offline; `wandb sync` sends it later")

    def begin(self) -> str:
        """Every attempt goes on with one run."""
        identity = self._about.identity or secrets.token_hex(4)
        self._run = self._init(
            project=os.environ.get("WANDB_PROJECT", self._about.name),
            name=os.environ.get("WANDB_NAME", self._about.run),
            id=identity,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", self._about.folder),
            mode=self._mode,
            config=self._about.recipe,
            allow_val_change=True,
            settings=self._settings(
                console="off",
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
                silent=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        # W&B's own step only grows: points of steps that were taken back could not come again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return identity

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """One row of the history each."""
        for row in rows:
            self._log(row)

    def evaluated(self, row: EvalRecord) -> None:
        """One row of the history."""
        self._log(row)

    def finish(self, status: str) -> None:
        """The status is in the run's summary."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status != "done"))

    def _log(self, row: StepRecord | EvalRecord) -> None:
        self._run.log({"step": row.step, "attempt": row.attempt, **points(row)})
