"""A small sweep in processes of its own, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from optuna.trial import TrialState

from mpcli.sweep.cells import Cell
from mpcli.sweep.folder import StudyRecord, SweepFolder
from mpcli.sweep.study import Study
from tests.small import RECIPE

CELLS = tuple(Cell(f"lr={lr}", (f"optim.lr={lr}",), seed) for lr in (0.1, 0.01) for seed in (0, 1))

# As `mptrain sweep` does it: what it tells goes to stderr, the trials to stdout.
_SWEEP = """
import json, sys
from pathlib import Path
from mpcli import signals
if __name__ == "__main__":
    signals.install()
    from mpcli.recipe.errors import UserError
    from mpcli.recipe.load import load_recipe
    from mpcli.sweep import jobs
    from mpcli.sweep.cells import Cell
    asked = json.loads(sys.argv[1])
    cells = [Cell(label, tuple(settings), seed) for label, settings, seed in asked["cells"]]
    recipe = load_recipe(asked["recipe"], asked["overrides"])
    jobs.start_server()
    from mpcli.sweep import study
    study.HEARTBEAT, study.GRACE = 1, 3
    try:
        results = jobs.run_sweep(
            Path(asked["folder"]), recipe, cells, kind="grid", asked={"over": ["optim.lr"]},
            storage=asked["storage"], jobs=asked["jobs"],
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.exit_code))
    print(json.dumps([json.loads(result.to_json()) for result in results]))
"""


@contextlib.contextmanager
def sweeping(
    folder: Path,
    *overrides: str,
    storage: str | None = None,
    jobs: int = 2,
    cells: tuple[Cell, ...] = CELLS,
) -> Iterator[subprocess.Popen[str]]:
    """A process that sweeps, for a block; `folder` is the sweep's."""
    recipe = folder.parent / "small.yaml"
    recipe.write_text(RECIPE)
    script = folder.parent / "sweep.py"
    script.write_text(_SWEEP)
    asked = {
        "folder": str(folder),
        "recipe": str(recipe),
        "overrides": list(overrides),
        "cells": [(cell.label, cell.settings, cell.seed) for cell in cells],
        "storage": storage,
        "jobs": jobs,
    }
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(asked)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def finished(process: subprocess.Popen[str]) -> list[dict[str, object]]:
    """The trials of a process that sweeps to the end."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    trials: list[dict[str, object]] = json.loads(out)
    return trials


def study_of(folder: Path, url: str | None = None) -> Study:
    """The study of a sweep."""
    about = StudyRecord.model_validate_json((folder / "study.json").read_bytes())
    return Study(SweepFolder(folder), about.name, url)


def complete(study: Study) -> list[str]:
    """The cells of the trials that are complete, in alphabetical order."""
    trials = study.optuna.get_trials(states=(TrialState.COMPLETE,))
    return sorted(trial.user_attrs["cell"] for trial in trials)


def done_runs(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The runs that have ended: their attempts, and what their results say."""
    return {
        path.parent.name: (len(list(path.parent.glob("attempts/*"))), path.read_bytes())
        for path in folder.glob("trials/*/result.json")
        if json.loads(path.read_bytes())["status"] == "done"
    }


def processes_of(folder: Path) -> list[int]:
    """That have the log of a trial, or a lock, of a sweep open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [str(file.readlink()) for file in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(file.startswith(f"{folder}/") for file in files):
            found.append(int(process.name))
    return found


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str], number: int = 1) -> None:
    """Until so many of the sweep's files are there."""
    end = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < number:
        if process.poll() is not None:  # it has ended: they were there
            assert process.returncode == 0, process.communicate()
            return
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(folder: Path, seconds: float = 3) -> bool:
    """Whether nothing is left running."""
    end = time.monotonic() + seconds
    while processes_of(folder) and time.monotonic() < end:
        time.sleep(0.05)
    return not processes_of(folder)
