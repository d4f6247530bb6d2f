"""The folder of a sweep: the only module that knows its file names.

recipe.yaml            of all trials, resolved, without the settings of each
study.json             what was asked
study.journal          the study, unless it is in a database; Optuna's format
claim.lock             held while the folder or the study is given something to do
trials/<cell>/         an ordinary run directory
trials/<cell>.lock     held by the process that runs the cell
trials/<cell>.log      what that process and its libraries print
result.json            last, and atomically
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mpcli.recipe.changes import differences, shown
from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.errors import Exit, Problem, UserError, user_error
from mpcli.recipe.load import LoadedRecipe, load_recipe
from mpcli.recipe.recipe import Recipe
from mpcli.records import SCHEMA_VERSION, Record
from mpcli.rundir import storage_errors, sync
from mpcli.sweep.cells import Cell
from mpcli.sweep.results import SweepResult


class StudyRecord(Record):
    """`study.json`."""

    version: int = SCHEMA_VERSION
    kind: str
    name: str
    asked: dict[str, Any]
    plugin_sha256: str | None = None


def identity(loaded: LoadedRecipe, asked: Mapping[str, Any]) -> str:
    """Eight digits: the same for the same question about the same recipe, on any machine."""
    plugin = loaded.plugin.sha256 if loaded.plugin else None
    text = json.dumps([_values(loaded.recipe), plugin, asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _values(recipe: Recipe) -> dict[str, Any]:
    """Without where the data lie and the runs go, which differs between machines."""
    return recipe.model_dump(mode="json", exclude={"output": True, "data": {"path"}})


class SweepFolder:
    """Where a sweep's study and its trials are."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # by a relative one Optuna's journals are not safe

    @property
    def recipe_path(self) -> Path:
        """The recipe of all trials."""
        return self.path / "recipe.yaml"

    @property
    def journal_path(self) -> Path:
        """The study, where it is in a file."""
        return self.path / "study.journal"

    def run_path(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.path / "trials" / cell.name

    def log_path(self, cell: Cell) -> Path:
        """What the process of a cell prints."""
        return self.path / "trials" / f"{cell.name}.log"

    @contextlib.contextmanager
    def claiming(self) -> Iterator[None]:
        """One process of this machine at a time, or of those that share the folder."""
        lock = locked(self.path / "claim.lock", wait=True)
        assert lock is not None
        with lock:
            yield

    def cell_lock(self, cell_name: str) -> BinaryIO | None:
        """The lock of the process that runs a cell; None while another process has it."""
        return locked(self.path / "trials" / f"{cell_name}.lock")

    def prepare(self, loaded: LoadedRecipe, kind: str, asked: Mapping[str, Any]) -> StudyRecord:
        """Make the folder, or see that it is the one of this sweep.

        Raises:
            UserError: exit 2, it holds something else, or another sweep, and how that differs; 4,
                `study.json` cannot be read; 7, it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise user_error(f"{self.path}: is a file", "name a new or an empty folder")
        about = StudyRecord(
            kind=kind,
            name=f"{loaded.recipe.name}/sweep-{kind}-{identity(loaded, asked)}",
            asked=json.loads(json.dumps(asked)),  # as it will be read
            plugin_sha256=loaded.plugin.sha256 if loaded.plugin else None,
        )
        with storage_errors(self.path, f"the folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "study.json").exists():
                self._check_empty()
            with self.claiming():
                if not (self.path / "study.json").exists():
                    self._write("study.json", about.to_json(indent=2) + "\n")
                self._check_same(about)
                if not self.recipe_path.exists():
                    self._write("recipe.yaml", resolved_yaml(loaded.recipe))
                self._check_recipe(loaded)
                (self.path / "trials").mkdir(exist_ok=True)
                sync(self.path)
        return about

    def write_result(self, result: SweepResult) -> None:
        """Whole, or not at all.

        Raises:
            UserError: exit 7, it cannot be written.
        """
        with storage_errors(self.path, f"the folder {self.path}"), self.claiming():
            self._write("result.json", result.to_json(indent=2) + "\n")
            sync(self.path)

    def _check_empty(self) -> None:
        ours = {"claim.lock", "study.json", "study.json.tmp"}  # of a beginning
        if self.recipe_path.exists() and (self.path / "trials").is_dir():  # what was asked is lost
            ours |= {"recipe.yaml", "trials", "result.json", "study.journal", "study.journal.lock"}
        found = {entry.name for entry in self.path.iterdir()} - ours
        if not found or (self.path / "study.json").exists():
            return
        holds = "holds a run" if "attempts" in found else "is not empty, and holds no sweep"
        raise user_error(
            f"--output {self.path}: the folder {holds}", "name a new or an empty folder"
        )

    def _check_same(self, about: StudyRecord) -> None:
        path = self.path / "study.json"
        try:
            before = StudyRecord.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise user_error(
                f"{path}: says nothing about a sweep",
                "move it away with `study.journal`: finished trials are taken over as they are",
                exit_code=Exit.CHECKPOINT,
            ) from error
        hint = "name another folder with `--output`, or ask the same as before"
        exclude = {"version", "name"}
        changed = differences(before.model_dump(exclude=exclude), about.model_dump(exclude=exclude))
        problems = [
            Problem(
                f"{self.path}: a sweep with {path.removeprefix('asked.')} {shown(old)}, "
                f"found {shown(new)}",
                hint,
            )
            for path, old, new in changed
        ]
        if problems:
            raise UserError(*problems)

    def _check_recipe(self, loaded: LoadedRecipe) -> None:
        try:
            before = load_recipe(self.recipe_path, plugin=loaded.plugin).recipe
        except UserError as error:
            what = f"{self.recipe_path}: the sweep's own recipe: {error.problems[0].what}"
            hint = "move it away: it is written again"
            raise user_error(what, hint, exit_code=Exit.CHECKPOINT) from error
        hint = "name another folder with `--output`: this sweep's recipe does not change"
        problems = [
            Problem(f"the sweep has {shown(old)}, found {shown(new)}", hint, path)
            for path, old, new in differences(_values(before), _values(loaded.recipe))
        ]
        if problems:
            raise UserError(*(problem.at(loaded.place(problem.path)) for problem in problems))

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)


def locked(path: Path, *, wait: bool = False) -> BinaryIO | None:
    """A lock that the kernel releases when its process is gone, however that happens.

    Returns:
        the file to close; None where another process holds it and is not waited for.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
