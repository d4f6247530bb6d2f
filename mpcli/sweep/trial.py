"""One trial of a sweep: an ordinary run, and what the study is told of it."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mpcli import signals
from mpcli.launch import launch
from mpcli.machine import detect_machine, environment
from mpcli.plan import make_plan
from mpcli.progress import Diverged
from mpcli.recipe.engine import Local
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recipe.load import LoadedRecipe, load_recipe, recorded_recipe
from mpcli.recipe.plugin import PluginFile
from mpcli.recipe.recipe import Recipe
from mpcli.records import EvalRecord, Plan, Result, StepRecord
from mpcli.rundir import RunDirectory, storage_errors
from mpcli.sweep.cells import Cell
from mpcli.sweep.folder import SweepFolder
from mpcli.sweep.results import TrialResult
from mpcli.sweep.study import WORSE, Claim, unrun

logger = logging.getLogger(__name__)

EVERY = 10
"""Steps between two looks at the loss, which is their mean."""


def run_trial(
    claim: Claim, folder: SweepFolder, kind: str, plugin: PluginFile | None = None
) -> None:
    """Run a claimed cell, or go on with its run, and tell the study how it ended.

    A run that is stopped goes back to the study, and so does one whose disk is full.

    Args:
        kind: of the sweep.

    Raises:
        UserError: exit 7, the run cannot be written; or the study cannot be told.
        Lost: the trial was taken over by another process.
    """
    cell = claim.cell
    try:
        run, result = _trained(claim, folder, plugin)
    except UserError as error:
        if error.exit_code is Exit.STORAGE or RunDirectory(folder.run_path(cell)).is_held():
            claim.give_back()
            raise
        claim.end(unrun(cell, str(error)))
        return
    except KeyboardInterrupt:
        claim.give_back()
        return
    if result.status in ("preempted", "interrupted"):
        claim.give_back()
    elif result.exit_code == Exit.STORAGE:
        claim.give_back()
        raise user_error(f"{cell.name}: {result.reason}", _ROOM, exit_code=Exit.STORAGE)
    else:
        claim.end(trial_result(cell, run, result, kind))


_ROOM = "free some space; the same command goes on with the sweep"


def _trained(
    claim: Claim, folder: SweepFolder, plugin: PluginFile | None
) -> tuple[RunDirectory, Result]:
    """The run of a cell, and how it ended, now or before."""
    cell, path = claim.cell, folder.run_path(claim.cell)
    if ended := _ended_before(path):
        return ended
    loaded = load_recipe(folder.recipe_path, cell.overrides, plugin)
    plan = make_plan(loaded.recipe, detect_machine())
    signals.check()
    found = environment()
    run = _begun(path, loaded, plan, found)
    result = _launched(run, claim, loaded, plan, found)
    return RunDirectory.read(path), result


def _ended_before(path: Path) -> tuple[RunDirectory, Result] | None:
    """The run of a process that died before it told of it."""
    if not path.is_dir():
        return None
    run = RunDirectory(path)
    result = run.result()
    stopped = result and result.status in ("preempted", "interrupted")
    if result is None or stopped or result.exit_code == Exit.STORAGE:
        return None
    return RunDirectory.read(path), result


def _begun(path: Path, loaded: LoadedRecipe, plan: Plan, found: dict[str, Any]) -> RunDirectory:
    """A new run, or the next attempt at one."""
    if path.exists() and not _has_plan(path):  # its process died while it made the folder
        with storage_errors(path):
            shutil.rmtree(path)
    if not path.exists():
        return RunDirectory.create(loaded, plan, found, path)
    run = RunDirectory.open(path)
    try:
        run.begin_attempt(loaded.recipe, plan, found, ())
    except BaseException:
        run.close()
        raise
    return run


def _has_plan(path: Path) -> bool:
    try:
        RunDirectory.read(path).plan()
    except (UserError, OSError, ValueError):
        return False
    return True


def _launched(
    run: RunDirectory, claim: Claim, loaded: LoadedRecipe, plan: Plan, found: dict[str, Any]
) -> Result:
    """Train it; a bug is in its log, and one trial's."""
    try:
        if isinstance(loaded.recipe.engine, Local):
            return launch(run, _Watch(run, claim), loaded.plugin)
        from mpcli.elastic import supervise

        try:
            return supervise(run, loaded.recipe, plan, found, logger.info, loaded.plugin)
        finally:
            run.close()
    except UserError:
        raise
    except Exception:
        if (result := run.result()) is None:
            raise
        return result


class _Watch:
    """A display that shows nothing, and ends a run whose loss goes the wrong way."""

    def __init__(self, run: RunDirectory, claim: Claim) -> None:
        self._run = run
        self._claim = claim
        self._losses: deque[float] = deque(maxlen=EVERY)
        self._first: float | None = None

    def start(self, plan: Plan, recipe: Recipe) -> None:
        """Of a run that is gone on with, the first step is in its rows."""
        losses = (row.loss for row in self._run.steps())
        self._first = next(filter(math.isfinite, losses), None)

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """New rows.

        Raises:
            Diverged: the loss is far above that of the first step.
        """
        for row in rows:
            if self._first is None and math.isfinite(row.loss):
                self._first = row.loss
            self._losses.append(row.loss)
            if row.step % EVERY == 0:
                self._judge(row.step, self._first)

    def _judge(self, step: int, first: float | None) -> None:
        """Look at the last losses; single ones that are not finite belong to steps it skips."""
        losses = list(filter(math.isfinite, self._losses))
        if first is None or not losses:
            if self._claim.is_worse(step, math.nan):
                raise Diverged(f"step {step}: no loss of {len(self._losses)} steps is finite")
        elif first > 0:  # a loss may be negative
            loss = _mean(losses)
            if self._claim.is_worse(step, loss / first):
                raise Diverged(
                    f"step {step}: the mean loss of {len(self._losses)} steps is {loss:.4g}, more "
                    f"than {WORSE:g} times the {first:.4g} of the first one"
                )

    def evaluated(self, row: EvalRecord) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


def trial_result(cell: Cell, run: RunDirectory, result: Result, kind: str) -> TrialResult:
    """What a study keeps of a run that has ended."""
    rows = list(run.steps())
    losses = [row.loss for row in rows]
    last = losses[-max(5, len(losses) // 10) :]
    batch = recorded_recipe(run.recipe_path).train.global_batch_size
    speeds = [batch / row.samples_per_second for row in rows if row.samples_per_second > 0]
    evidence: dict[str, Any] = {}
    if kind == "loss-scale" and rows:
        from mpcli.sweep.evidence import evidence_of

        evidence = evidence_of(run)
    return TrialResult(
        label=cell.label,
        seed=cell.seed,
        settings=cell.settings,
        run=cell.name,
        status=result.status,
        reason=result.reason,
        steps=result.steps_attempted,
        skipped=result.steps_skipped,
        first_loss=losses[0] if losses else None,
        loss=_mean(last) if last else None,
        metrics=result.metrics.get("eval", {}),
        seconds_per_step=statistics.median(speeds) if speeds else None,
        peak_memory_bytes=result.peak_memory_bytes,
        **evidence,
    )


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)  # `fmean` refuses infinities of both signs
