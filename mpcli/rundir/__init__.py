"""The run directory: the only module that knows its file names.

recipe.yaml            resolved, runnable as it is, never rewritten
recipe.source.yaml     the text the person wrote
plugin.py, plugin.json of a plug-in: its text, which nothing here runs; its name and SHA-256
attempts/<k>/          plan.json, environment.json, observed.json, log.rank<N>.txt;
                       with DeepSpeed deepspeed.json, what it was told;
                       of a resume also recipe.yaml (what it may change) and resumed.json;
                       where several processes train: rank<N>.json, where each is, and
                       failure.rank<N>.json of one that ended by itself
steps.jsonl            one row per attempted step
layers.jsonl           rows of the probe: one per tensor of a sampled step; at most 32 MiB
evals.jsonl            one row per evaluation
rollbacks.jsonl        one row per return to a checkpoint (`train.on_nonfinite: rollback`)
flights/               step-<N>: batch, random state and last table of a step that went wrong
checkpoints/           step-<N>, to go on from
trackers/<name>/       what a tracker of `output.trackers` writes; run.json: how far it has got;
                       lock: held while one runs
final/                 model.safetensors, model.json, README.md, and what loads it elsewhere
lock                   held while a process writes here
result.json            last, and atomically
diagnosis.json         what `mptrain diagnose --json` printed, where somebody kept it

A run that is not ours (`foreign.json` instead of a recipe) was written by a recorder in somebody's
own loop; it also has `events.jsonl`: what happened in a step, whenever that changes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.errors import Exit, Problem, user_error
from mpcli.recipe.load import LoadedRecipe
from mpcli.recipe.recipe import Recipe
from mpcli.records import (
    EvalRecord,
    ForeignRun,
    Heartbeat,
    LayerRecord,
    LoopRecord,
    ModuleTypes,
    Plan,
    PluginRecord,
    RankFailure,
    Record,
    Result,
    RollbackRecord,
    StepRecord,
    TrackerState,
    TrainedOn,
    strict_json,
)
from mpcli.rundir.locks import is_held
from mpcli.rundir.members import Pulse, failures, heartbeats, write_failure
from mpcli.rundir.places import (
    attempts,
    check_is_run,
    empty_folder,
    new_folder,
    newest_run,
    point_latest,
)
from mpcli.rundir.rows import LONGEST_ROW, Tail, cut, last_rows, read_rows, thin
from mpcli.rundir.search import find_runs, num_bytes
from mpcli.rundir.storage import known_object, storage_errors, sync

__all__ = ["RunDirectory", "find_runs", "newest_run", "num_bytes", "storage_errors", "sync"]

logger = logging.getLogger(__name__)

MAX_LAYER_BYTES = 2**25
"""Of `layers.jsonl`: when it grows beyond, every second sampled step is taken out."""
RESERVE = 2**18
"""Bytes on the disk that evidence leaves free."""
_LONGEST_RESULT = 2**20
_OBSERVED = TypeAdapter(dict[str, ModuleTypes])


class RunDirectory:
    """A run's folder on disk. Nothing in it names its own path.

    Attributes:
        attempt: of this process, from 1.
        rank: of this process; all but rank 0 write only what is about themselves.
        step: attempted, which this process is in; 0 before training.
        ended: whether this rank ended as all did.
        lost: what to tell of records that could not be written.
    """

    def __init__(self, path: Path, attempt: int = 1, rank: int = 0) -> None:
        self.path = path
        self.attempt = attempt
        self.rank = rank
        self.step = 0
        self.ended = False
        self.lost: Problem | None = None
        self._files: dict[str, BinaryIO] = {}
        self._unwritable: OSError | None = None  # what stood in the way of the lock
        self._pulse: Pulse | None = None  # where several processes train

    @classmethod
    def create(
        cls,
        loaded: LoadedRecipe,
        plan: Plan,
        environment: Mapping[str, Any],
        output: Path | None = None,
    ) -> RunDirectory:
        """Make the folder with all that is known before step 1, and take its lock.

        Args:
            output: the folder itself; None: `runs/<name>/<UTC time>-<recipe hash>`, to which
                `runs/<name>/latest` then points.

        Raises:
            UserError: exit 2 for an `output` that is not empty, 7 where it cannot be written.
        """
        text = resolved_yaml(loaded.recipe)
        path = new_folder(loaded.recipe.name, text) if output is None else empty_folder(output)
        run = cls(path)
        with storage_errors(path, f"the run directory {path}"):
            run._lock()
            try:
                run._write_beginning(loaded, text, plan, environment)
                with contextlib.suppress(OSError):  # its folder may be another's
                    sync(path.parent)
                if output is None:
                    point_latest(path)
            except BaseException:
                run._undo(keep_folder=output is not None)
                raise
        return run

    @classmethod
    def create_foreign(
        cls, about: ForeignRun, environment: Mapping[str, Any], output: Path
    ) -> RunDirectory:
        """Make the folder of a run that trains elsewhere and is only recorded, and take its lock.

        Raises:
            UserError: exit 2 for an `output` that is not empty, 7 where it cannot be written.
        """
        run = cls(empty_folder(output))
        with storage_errors(output, f"the run directory {output}"):
            run._lock()
            run._write_process()
            run._write("foreign.json", about.to_json(indent=2) + "\n")
            run.attempt_path.mkdir(parents=True)
            run._write(
                f"attempts/{run.attempt}/environment.json", strict_json(dict(environment), 2) + "\n"
            )
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Take the lock of a run, to go on with it; its `attempt` is the newest there is.

        Raises:
            UserError: exit 2 for what is not a run, or is another process's. Where it cannot
                be written, `begin_attempt` says so: a finished run may still be looked at.
        """
        run = cls.read(path, "--resume ")
        run.refuse_foreign("--resume ")
        try:
            run._lock()
            run._write_process()
        except OSError as error:
            run._unwritable = error
        return run

    @classmethod
    def read(cls, path: Path, option: str = "") -> RunDirectory:
        """A run that is only looked at; its `attempt` is the newest there is.

        Args:
            option: of the command line, that named it.

        Raises:
            UserError: exit 2 for what is not a run.
        """
        check_is_run(path, option)
        return cls(path, max(attempts(path), default=1))

    @classmethod
    def join(cls, path: Path, attempt: int, rank: int) -> RunDirectory:
        """An attempt at a run whose lock another process holds, as one of its ranks.

        The attempt is told: a list of the folder may be an old one on a disk that machines share.
        """
        return cls(path, attempt, rank)

    def begin_attempt(
        self, recipe: Recipe, plan: Plan, environment: Mapping[str, Any], changes: Sequence[str]
    ) -> None:
        """A new attempt at the opened run; the run is not over any more.

        Args:
            changes: values that differ from those of the attempt before, in words.

        Raises:
            UserError: exit 7, the folder cannot be written.
        """
        attempt = max([1, *attempts(self.path)]) + 1  # never the first: it goes on
        name = f"attempts/{attempt}.tmp"
        with storage_errors(self.path, f"the run directory {self.path}"):
            if self._unwritable:
                raise self._unwritable
            shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / name).mkdir(parents=True)
            self._write(f"{name}/resumed.json", strict_json({"changes": changes}, 2) + "\n")
            self._write(f"{name}/recipe.yaml", resolved_yaml(recipe))
            self._write_attempt(name, plan, environment)
            (self.path / name).rename(self.path / "attempts" / str(attempt))
            sync(self.path / "attempts")
            (self.path / "result.json").unlink(missing_ok=True)
        self.attempt, self.step = attempt, 0

    def newest_attempt(self) -> RunDirectory:
        """The same run, whose attempt is the newest there is now."""
        return RunDirectory(self.path, max(attempts(self.path), default=1))

    def foreign(self) -> ForeignRun | None:
        """What was recorded, where the run is not ours."""
        path = self.path / "foreign.json"
        if not path.exists():
            return None
        try:
            return ForeignRun.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise user_error(
                f"{path}: says nothing about a run", "restore it from a copy of the run"
            ) from error

    def refuse_foreign(self, option: str = "") -> None:
        """A run that is not ours has no recipe.

        Raises:
            UserError: exit 2.
        """
        if self.foreign():
            raise user_error(
                f"{option}{self.path}: the record of a loop that is not mptrain's: no recipe, no "
                "checkpoints",
                f"`mptrain diagnose {self.path}` shows what it holds",
            )

    @property
    def attempt_path(self) -> Path:
        """Folder of this attempt."""
        return self.path / "attempts" / str(self.attempt)

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe, with what a resume changed."""
        resumed = self.attempt_path / "recipe.yaml"
        return resumed if resumed.exists() else self.path / "recipe.yaml"

    @property
    def source_path(self) -> Path:
        """The text that the recipe was written in."""
        return self.path / "recipe.source.yaml"

    @property
    def diagnosis_path(self) -> Path:
        """Where what `mptrain diagnose --json` printed may be kept."""
        return self.path / "diagnosis.json"

    @property
    def log_path(self) -> Path:
        """Text log of this process."""
        return self.attempt_path / f"log.rank{self.rank}.txt"

    def tracker_path(self, name: str) -> Path:
        """Folder of a tracker."""
        return self.path / "trackers" / name

    def tracker_state(self, name: str) -> TrackerState:
        """How far a tracker has got; nowhere, where nothing can be read."""
        try:
            with (self.tracker_path(name) / "run.json").open("rb") as file:
                return TrackerState.model_validate_json(file.read(LONGEST_ROW))
        except (OSError, ValueError):
            return TrackerState()

    def write_tracker_state(self, name: str, state: TrackerState) -> None:
        """Say how far a tracker has got."""
        path = self.tracker_path(name) / "run.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(state.to_json() + "\n", encoding="utf-8")
        temporary.replace(path)

    @contextlib.contextmanager
    def tracking(self, name: str) -> Iterator[None]:
        """Wait until no other process is this tracker of the run, one of a killed attempt, say."""
        self.tracker_path(name).mkdir(parents=True, exist_ok=True)
        with (self.tracker_path(name) / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def checkpoints_path(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def has_checkpoints(self) -> bool:
        """Whether anything is in the folder of checkpoints."""
        return self.checkpoints_path.is_dir() and any(self.checkpoints_path.iterdir())

    def checkpoint_name(self, step: int | None) -> str | None:
        """The checkpoint after a step, in this folder; None where there is none."""
        name = f"checkpoints/step-{step}"
        return name if (self.path / name).is_dir() else None

    @property
    def flights_path(self) -> Path:
        """Folder of the steps that went wrong."""
        return self.path / "flights"

    @property
    def final_path(self) -> Path:
        """Folder of the trained model."""
        return self.path / "final"

    def plan(self) -> Plan:
        """The plan of this attempt."""
        return Plan.model_validate_json((self.attempt_path / "plan.json").read_text("utf-8"))

    def plugin(self) -> PluginRecord | None:
        """The plug-in that the run was made with; None where it has none."""
        path = self.path / "plugin.json"
        if not path.exists():
            return None
        try:
            return PluginRecord.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise user_error(
                f"{path}: says nothing about a plug-in", "restore it from a copy of the run"
            ) from error

    def trained_on(self) -> TrainedOn:
        """What the trained model took from its training data.

        Raises:
            UserError: exit 2, there is no trained model yet; 4, nothing can be read.
        """
        path = self.final_path / "model.json"
        if not self.final_path.is_dir():
            raise user_error(
                f"{self.path}: what the model took from its training data is in `final`, and there "
                "is none yet",
                f"finish the run with `mptrain run --resume {self.path}`, or leave out the other "
                "data",
            )
        try:
            return TrainedOn.model_validate(json.loads(path.read_bytes())["data"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise user_error(
                f"{path}: says nothing about what the model took from the training data",
                "restore it from a copy of the run",
                exit_code=Exit.CHECKPOINT,
            ) from error

    def result(self) -> Result | None:
        """How the newest attempt ended; None where it did not, or nothing can be read."""
        try:
            with (self.path / "result.json").open("rb") as file:
                return Result.model_validate_json(file.read(_LONGEST_RESULT))
        except (OSError, ValueError):
            return None

    def has_result(self) -> bool:
        """Whether there is a `result.json`, readable or not."""
        return (self.path / "result.json").exists()

    def is_held(self) -> bool:
        """Whether a process of this machine writes to the run."""
        return is_held(self.path / "lock")

    def environment(self) -> dict[str, Any]:
        """Of this attempt; empty if unknown."""
        return known_object(self.attempt_path / "environment.json")

    def changes(self) -> tuple[str, ...]:
        """What this attempt changed, or why it was begun, in words; a first one has nothing."""
        changes = known_object(self.attempt_path / "resumed.json").get("changes")
        return tuple(map(str, changes)) if isinstance(changes, list) else ()

    def diagnosis(self) -> dict[str, Any]:
        """What `mptrain diagnose --json` printed; empty where nobody kept it."""
        return known_object(self.path / "diagnosis.json")

    def began(self, attempt: int | None = None) -> float | None:
        """When an attempt (default: this one) began, in seconds since 1970."""
        folder = self.path / "attempts" / str(attempt or self.attempt)
        return _changed(folder / "environment.json")

    def last_written(self) -> float | None:
        """When the newest row of a step was written, in seconds since 1970."""
        return _changed(self.path / "steps.jsonl")

    def cut(self, steps: int, evaluations: int) -> int:
        """Take back the rows of later steps, and a last row that is not whole.

        Args:
            steps: the last one whose row in `steps.jsonl` stays.
            evaluations: the last one whose row in `evals.jsonl` stays.

        Returns:
            The last step in `steps.jsonl` now: fewer than `steps` where rows were lost. Not in
            rank 0, which does that: `steps`.
        """
        if self.rank:
            return steps
        cut(self.path / "evals.jsonl", evaluations)
        cut(self.path / "layers.jsonl", steps, several=True)
        cut(self.path / "rollbacks.jsonl", steps)
        return cut(self.path / "steps.jsonl", steps)

    def sync(self) -> None:
        """Bring the rows to the disk."""
        with self.recording():
            for name, file in self._files.items():
                if name != "lock":
                    os.fsync(file.fileno())

    def check_reserve(self) -> None:
        """Before evidence is written: the last room on a disk is for the result of the run.

        Raises:
            OSError: there is no more than that.
        """
        if shutil.disk_usage(self.path).free < RESERVE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """For records, which are worth less than the training: it goes on without them.

        The first error is told, in the log and as `lost`; every later write is tried again.
        """
        try:
            yield
        except OSError as error:
            if self.lost is None:
                what = f"records were lost: {error.strerror or error}"
                self.lost = Problem(what, "free some space", severity="warning")
                logger.warning("%s; the training goes on", what)

    def write_observed(self, types: Mapping[str, ModuleTypes]) -> None:
        """Keep the types that each module had in the first step of this attempt."""
        if self.rank:
            return
        text = strict_json({name: seen.model_dump() for name, seen in types.items()}, indent=2)
        with self.recording():
            self._write(f"attempts/{self.attempt}/observed.json", text + "\n")

    def write_library_config(self, library: str, config: Mapping[str, Any]) -> None:
        """Keep what a library was told in this attempt that trains for us."""
        if not self.rank:
            with self.recording():
                text = strict_json(dict(config), indent=2)
                self._write(f"attempts/{self.attempt}/{library}.json", text + "\n")

    def at_step(self, step: int) -> None:
        """Note, where several ranks train, the attempted step that this one begins."""
        self.step = step
        if self._pulse:
            self._pulse.beat(step)

    def begin_heartbeat(self) -> None:
        """Say where this rank is from now on."""
        with storage_errors(self.path):
            self._pulse = Pulse(self.attempt_path, self.rank)

    def end_heartbeat(self) -> None:
        """Say that this rank ended as all did."""
        self.ended = True
        if self._pulse:
            self._pulse.end()

    def heartbeats(self, ranks: Collection[int] | None = None) -> dict[int, Heartbeat]:
        """Where ranks of this attempt are, by rank; by default all of them."""
        return heartbeats(self.attempt_path, ranks)

    def write_failure(self, failure: RankFailure) -> None:
        """Say that a rank of this attempt ended by itself."""
        with storage_errors(self.path):
            write_failure(self.attempt_path, failure)

    def failures(self) -> dict[int, RankFailure]:
        """The ranks of this attempt that ended by themselves, and how."""
        return failures(self.attempt_path)

    def append_steps(self, rows: Iterable[StepRecord]) -> None:
        """Write rows to `steps.jsonl`; they have left this process when this returns."""
        self._append("steps.jsonl", rows)

    def append_layers(self, rows: Sequence[LayerRecord]) -> None:
        """Write the rows of one sampled step to `layers.jsonl`, which stays bounded."""
        if not rows or self.rank:
            return
        with self.recording():
            self.check_reserve()
            self._append("layers.jsonl", rows)
            path = self.path / "layers.jsonl"
            if path.exists() and path.stat().st_size > MAX_LAYER_BYTES:
                self._files.pop("layers.jsonl").close()
                thin(path)

    def append_events(self, row: LoopRecord) -> None:
        """Write a row to `events.jsonl`."""
        self._append("events.jsonl", [row])

    def events(self, unread: Counter[str] | None = None) -> Iterator[LoopRecord]:
        """The rows of `events.jsonl` that can be read, in order; `unread` counts the others."""
        return read_rows(self.path / "events.jsonl", LoopRecord, unread)

    def steps(self, unread: Counter[str] | None = None) -> Iterator[StepRecord]:
        """The rows of `steps.jsonl` that can be read, in order; `unread` counts the others."""
        return read_rows(self.path / "steps.jsonl", StepRecord, unread)

    def last_steps(self, count: int) -> list[StepRecord]:
        """The newest rows of `steps.jsonl` that can be read, in order."""
        return last_rows(self.path / "steps.jsonl", StepRecord, count)

    def layers(self, unread: Counter[str] | None = None) -> Iterator[LayerRecord]:
        """The rows of `layers.jsonl` that can be read, in order; `unread` counts the others."""
        return read_rows(self.path / "layers.jsonl", LayerRecord, unread)

    def new_steps(self) -> Tail[StepRecord]:
        """The rows of `steps.jsonl`, while they are written."""
        return Tail(self.path / "steps.jsonl", StepRecord)

    def new_evaluations(self) -> Tail[EvalRecord]:
        """The rows of `evals.jsonl`, while they are written."""
        return Tail(self.path / "evals.jsonl", EvalRecord)

    def rollbacks(self) -> Iterator[RollbackRecord]:
        """The rows of `rollbacks.jsonl` that can be read, in order."""
        return read_rows(self.path / "rollbacks.jsonl", RollbackRecord)

    def evaluations(self) -> Iterator[EvalRecord]:
        """The rows of `evals.jsonl` that can be read, in order."""
        return read_rows(self.path / "evals.jsonl", EvalRecord)

    def last_evaluation(self) -> EvalRecord | None:
        """The newest row of `evals.jsonl` that can be read."""
        return next(iter(last_rows(self.path / "evals.jsonl", EvalRecord, 1)), None)

    def observed(self) -> dict[str, ModuleTypes]:
        """The types of every module in the first step of this attempt; empty if unknown."""
        try:
            return _OBSERVED.validate_json((self.attempt_path / "observed.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def append_evaluation(self, row: EvalRecord) -> None:
        """Write a row to `evals.jsonl`."""
        self._append("evals.jsonl", [row])

    def append_rollback(self, row: RollbackRecord) -> None:
        """Write a row to `rollbacks.jsonl`."""
        self._append("rollbacks.jsonl", [row])

    @contextlib.contextmanager
    def replacing_final(self) -> Iterator[Path]:
        """A folder that becomes `final/` at the end of the block, in place of an older one."""
        temporary = self.path / "final.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if self.final_path.exists():
            shutil.rmtree(self.final_path)
        temporary.rename(self.final_path)
        sync(self.path)

    def write_result(self, result: Result) -> None:
        """Write `result.json`, after which the run is over."""
        with storage_errors(self.path):
            temporary = self.path / "result.json.tmp"
            with temporary.open("w", encoding="utf-8") as file:
                file.write(result.to_json(indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / "result.json")
            sync(self.path)

    def close(self) -> None:
        """Close the files and give the lock back."""
        with self.recording(), contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)
            self._files.clear()

    def _append(self, name: str, rows: Iterable[Record]) -> None:
        """Write whole rows, or none of them."""
        if self.rank:
            return
        text = "".join(row.to_json() + "\n" for row in rows).encode()
        with self.recording():
            if name not in self._files:
                self._files[name] = (self.path / name).open("ab", buffering=0)
                sync(self.path)
            file = self._files[name]
            end = os.fstat(file.fileno()).st_size
            try:
                while text:
                    text = text[file.write(text) :]
            except OSError:
                file.truncate(end)
                raise

    def _write_beginning(
        self, loaded: LoadedRecipe, text: str, plan: Plan, environment: Mapping[str, Any]
    ) -> None:
        self._write_process()
        self._write("recipe.yaml", text)
        self._write("recipe.source.yaml", loaded.source)
        if plugin := loaded.plugin:
            (self.path / "plugin.py").write_bytes(plugin.content)
            about = PluginRecord(file=Path(plugin.file).name, sha256=plugin.sha256)
            self._write("plugin.json", about.to_json(indent=2) + "\n")
        self.attempt_path.mkdir(parents=True)
        self._write_attempt(f"attempts/{self.attempt}", plan, environment)
        for folder in (self.attempt_path.parent, self.path):
            sync(folder)

    def _undo(self, *, keep_folder: bool) -> None:
        """Leave an empty folder, or none, so that the same command can be tried again."""
        with contextlib.suppress(OSError):
            for made in self.path.iterdir():
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            if not keep_folder:
                self.path.rmdir()
        self.close()

    def _write(self, name: str, text: str) -> None:
        with (self.path / name).open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _write_attempt(self, folder: str, plan: Plan, environment: Mapping[str, Any]) -> None:
        self._write(f"{folder}/plan.json", plan.to_json(indent=2) + "\n")
        self._write(f"{folder}/environment.json", strict_json(dict(environment), 2) + "\n")
        sync(self.path / folder)

    def _lock(self) -> None:
        # The kernel releases it when the process dies, however that happens.
        lock = (self.path / "lock").open("a+b", buffering=0)
        # A forked process would hold it as well, and longer, where it outlives this one.
        os.register_at_fork(after_in_child=lock.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            process = lock.read(20).decode("ascii", "replace").strip()
            lock.close()
            raise user_error(
                f"another process{f' ({process})' if process.isdigit() else ''} writes to this run",
                "wait for its end, or stop it",
            ) from error
        except OSError:
            lock.close()
            raise
        self._files["lock"] = lock

    def _write_process(self) -> None:
        self._files["lock"].truncate(0)
        self._files["lock"].write(f"{os.getpid()}\n".encode())


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
