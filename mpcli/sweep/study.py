"""The study of a sweep: which of its cells wait, are run by some process, and have ended.

Optuna keeps it, in a journal in the sweep's folder or in a database that machines share. A cell has
one trial after another. The first of them that has not failed counts: where two machines add one at
the same time, the later one is never run. What becomes of a cell follows from its trials alone, so
every process of the sweep, or the next one, sees the same.

A process holds the lock of the cell's file from before its trial is RUNNING until it has ended. A
RUNNING trial whose lock is free was left by a dead process: so it is found in a journal, which has
no heartbeat. In a database the heartbeat says it, and is recorded before the trial is RUNNING, for
Optuna takes a trial that never had one to be alive.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from mpcli.recipe.errors import Exit, user_error
from mpcli.rundir import storage_errors
from mpcli.sweep.cells import Cell
from mpcli.sweep.folder import SweepFolder
from mpcli.sweep.results import TrialResult
from mpcli.sweep.storage import database, journal, unreachable

HEARTBEAT, GRACE = 5, 20
"""Seconds between two heartbeats, and without any until a trial is taken to be dead."""
MAX_DEATHS = 3
"""A cell whose process died so often is not tried again."""
WORSE = 3.0
"""A trial is ended when its loss is so many times that of its first step."""

_ENDED, _FAILED, _DIED = "ended", "failed", "died"  # an attribute of failed trials, its values
_PART = 2**14  # characters of an attribute: MySQL holds 2^16 bytes, and quoting may double them

optuna.logging.set_verbosity(optuna.logging.CRITICAL + 1)  # what matters is told by us


class Lost(Exception):
    """The trial is another process's: this one was taken to be dead."""


@dataclass(frozen=True)
class Standing:
    """What is so of a cell.

    Attributes:
        ended: the trial that has its result.
        alive: the trial that waits or runs.
        deaths: of processes that ran it, while their sweep went on.
    """

    ended: FrozenTrial | None = None
    alive: FrozenTrial | None = None
    deaths: int = 0

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> Standing:
        """Of the trials of a cell, in their order."""
        ended = alive = None
        deaths = 0
        for trial in trials:
            told = trial.user_attrs.get(_ENDED)
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
                trial.state == TrialState.FAIL and told == _FAILED
            ):
                ended = ended or trial
            elif trial.state == TrialState.FAIL:  # or it was stopped, or died with its sweep
                deaths += told == _DIED
            else:
                alive = alive or trial
        return cls(ended, alive, deaths)

    @property
    def over(self) -> bool:
        """Whether it is not run any more."""
        return self.ended is not None or self.deaths >= MAX_DEATHS

    @property
    def waiting(self) -> bool:
        """Whether it can be run now."""
        return not self.over and self.alive is not None and self.alive.state == TrialState.WAITING


class Claim:
    """A cell that this process runs, and no other.

    Attributes:
        trial_id: of its trial.
    """

    def __init__(self, study: Study, cell: Cell, trial_id: int, lock: BinaryIO) -> None:
        self.cell = cell
        self.trial_id = trial_id
        self._trial = optuna.Trial(study.optuna, trial_id)
        self._study = study
        self._lock = lock
        # A forked process would hold it as well, and longer, where it outlives this one.
        os.register_at_fork(after_in_child=lock.close)
        self._over = threading.Event()
        self._heart: threading.Thread | None = None
        if study.has_heartbeat:
            self._heart = threading.Thread(target=self._beat, daemon=True)
            self._heart.start()

    def is_worse(self, step: int, loss: float) -> bool:
        """Tell of the run so far; whether it is to be ended.

        Args:
            loss: over that of the first step.
        """
        try:
            self._trial.report(loss, step)
            return self._trial.should_prune()
        except (StorageInternalError, UpdateFinishedTrialError, OSError):
            return False  # the training is worth more than this

    def end(self, result: TrialResult) -> None:
        """Tell how the run ended.

        Raises:
            Lost: the trial was taken over.
        """
        text = result.to_json()
        parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        attributes = {f"result.{number}": part for number, part in enumerate(parts)}
        if result.status == "failed":
            self._tell(TrialState.FAIL, attributes | {_ENDED: _FAILED})
        elif result.status == "done" and result.loss is not None and math.isfinite(result.loss):
            self._tell(TrialState.COMPLETE, attributes, result.loss)
        else:
            self._tell(TrialState.PRUNED, attributes)

    def give_back(self) -> None:
        """Leave the cell to be gone on with."""
        with contextlib.suppress(Lost):
            self._tell(TrialState.FAIL, {})

    def _tell(
        self, state: TrialState, attributes: dict[str, str], value: float | None = None
    ) -> None:
        with self._study.explained():
            try:
                for name, text in attributes.items():
                    self._trial.set_user_attr(name, text)
                self._study.optuna.tell(self._trial, value, state)
            except (UpdateFinishedTrialError, ValueError) as error:  # of one that has ended
                raise Lost from error
            finally:
                self.release()

    def release(self) -> None:
        """Be as a process that is gone, if nothing was told."""
        self._over.set()
        if self._heart:
            self._heart.join()
        self._lock.close()

    def _beat(self) -> None:
        while not self._over.wait(self._study.heartbeat):
            with contextlib.suppress(StorageInternalError):  # it may be back in time
                self._study.beat(self.trial_id)


class Study:
    """The trials of a sweep's cells, as one process sees and changes them.

    Args:
        url: of a database; None: the journal in the folder.
        heartbeat: seconds between two, where there is a database.
        grace: seconds without any.

    Raises:
        UserError: exit 2, `url` says nothing; 3, the database cannot be reached; 4, the journal is
            damaged; 7, it cannot be written.
    """

    def __init__(
        self,
        folder: SweepFolder,
        name: str,
        url: str | None = None,
        *,
        heartbeat: int = HEARTBEAT,
        grace: int = GRACE,
    ) -> None:
        self.heartbeat = heartbeat
        self.has_heartbeat = url is not None
        self._folder = folder
        self._url = url
        with self.explained():
            if url is None:
                self._storage = journal(folder.journal_path)
            else:
                self._storage = database(url, heartbeat, grace)
            self.optuna = self._study(name)

    def look(self, cells: Sequence[Cell]) -> dict[str, Standing]:
        """What is so of each cell, by its name and in their order."""
        by_name: dict[str, list[FrozenTrial]] = defaultdict(list)
        with self.explained():
            for trial in self.optuna.get_trials(deepcopy=False):
                by_name[trial.user_attrs.get("cell", "")].append(trial)
        return {cell.name: Standing.of(by_name[cell.name]) for cell in cells}

    def revive(self, cells: Sequence[Cell]) -> None:
        """Give every cell a trial that has none, or that a dead process left."""
        with self.explained(), self._folder.claiming():
            self._fail_dead(cells)
            standings = self.look(cells)
            for cell in cells:
                standing = standings[cell.name]
                if not standing.over and standing.alive is None:
                    settings = dict(setting.split("=", 1) for setting in cell.overrides)
                    self.optuna.enqueue_trial(settings, user_attrs={"cell": cell.name})

    def claim(self, cells: Sequence[Cell]) -> Claim | None:
        """The first of the cells that waits; None where none does."""
        with self.explained():
            for name, standing in self.look(cells).items():
                if not standing.waiting or (lock := self._folder.cell_lock(name)) is None:
                    continue
                assert standing.alive is not None
                trial_id = standing.alive._trial_id
                try:
                    if self.has_heartbeat:
                        self.beat(trial_id)
                    won = self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
                except UpdateFinishedTrialError:
                    won = False
                except BaseException:
                    lock.close()
                    raise
                if won:
                    cell = next(cell for cell in cells if cell.name == name)
                    return Claim(self, cell, trial_id, lock)
                lock.close()
        return None

    def result(self, cell: Cell, standing: Standing) -> TrialResult:
        """How a cell that is over ended.

        Raises:
            UserError: exit 4, nothing can be read.
        """
        if standing.ended is None:
            return unrun(cell, f"its process died {standing.deaths} times")
        attributes = standing.ended.user_attrs
        parts: list[str] = []
        while (name := f"result.{len(parts)}") in attributes:
            parts.append(str(attributes[name]))
        try:
            return TrialResult.model_validate_json("".join(parts))
        except ValueError as error:
            what = f"the study's trial {standing.ended.number} ({cell.name}) has no result"
            hint = "begin another sweep with `--output`, or with another database"
            raise user_error(what, hint, exit_code=Exit.CHECKPOINT) from error

    def died(self, trial_id: int) -> None:
        """Say that the process that ran a trial is gone, through no fault of the sweep's."""
        with self.explained(), contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, _ENDED, _DIED)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def beat(self, trial_id: int) -> None:
        """Say that a trial's process lives."""
        self._storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what is wrong with the storage into a `UserError`."""
        try:
            with storage_errors(self._folder.path, f"the sweep {self._folder.path}"):
                yield
        except (StorageInternalError, SQLAlchemyError) as error:
            raise unreachable(self._url or "", error) from error

    def _study(self, name: str) -> optuna.Study:
        pruner = optuna.pruners.ThresholdPruner(upper=WORSE)
        try:
            return optuna.load_study(study_name=name, storage=self._storage, pruner=pruner)
        except KeyError:
            return optuna.create_study(
                study_name=name, storage=self._storage, pruner=pruner, load_if_exists=True
            )

    def _fail_dead(self, cells: Sequence[Cell]) -> None:
        if self.has_heartbeat:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is called experimental
                fail_stale_trials(self.optuna)
            return
        for name, standing in self.look(cells).items():
            trial = standing.alive
            if trial is None or trial.state != TrialState.RUNNING:
                continue
            if (lock := self._folder.cell_lock(name)) is not None:
                with lock, contextlib.suppress(UpdateFinishedTrialError):
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def unrun(cell: Cell, reason: str) -> TrialResult:
    """Of a cell that no run shows anything of."""
    return TrialResult(
        label=cell.label,
        seed=cell.seed,
        settings=cell.settings,
        run=cell.name,
        status="failed",
        reason=reason,
        steps=0,
        skipped=0,
        first_loss=None,
        loss=None,
        metrics={},
        seconds_per_step=None,
        peak_memory_bytes=0,
    )
