"""The processes of a sweep: started, stopped, killed, joined by others, and none left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from optuna.trial import TrialState

from mpcli.recipe.errors import Exit, UserError
from mpcli.sweep import jobs
from mpcli.sweep.folder import SweepFolder
from mpcli.sweep.jobs import _gpus, run_sweep
from mpcli.sweep.study import Claim
from tests.debian import program
from tests.small import small_recipe
from tests.sweeps import (
    CELLS,
    complete,
    done_runs,
    finished,
    gone,
    processes_of,
    study_of,
    sweeping,
    wait_for,
)

STEPS = "train.steps=200"
NAMES = sorted(cell.name for cell in CELLS)


def test_sweeps_need_optuna(tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path)
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(UserError, match="optuna") as told,
    ):
        run_sweep(
            tmp_path / "sweep", loaded, CELLS, kind="grid", asked={}, storage=None, jobs=1,
            tell=print,
        )  # fmt: skip
    assert told.value.exit_code is Exit.ENVIRONMENT
    assert told.value.problems[0].hint == 'pip install "mptrain[sweep]"'
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("device", "visible", "gpus"),
    [("auto", None, ["0", "1"]), ("auto", "3,7,9", ["3", "7"]), ("cpu", None, [])],
)
def test_trials_are_given_the_gpus_that_the_command_may_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    visible: str | None,
    gpus: list[str],
) -> None:
    two = mock.Mock(cuda_devices=("a", "b"))
    monkeypatch.setattr("mpcli.machine.detect_machine", lambda: two)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpus(small_recipe(tmp_path, f"engine.device={device}").recipe) == gpus
    ddp = small_recipe(tmp_path, "engine={kind: ddp, device: auto, processes: 2}").recipe
    assert _gpus(ddp) == []  # takes several itself


@pytest.mark.parametrize("gpu", ["7", None])
def test_a_trial_sees_its_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str | None
) -> None:
    files, seen = SweepFolder(tmp_path / "sweep"), []
    about = files.prepare(small_recipe(tmp_path), "grid", {})
    work = jobs._Work(files, about.name, None, (1, 3), "grid", CELLS, None, threads=1, gpu=gpu)
    work.study().revive(CELLS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(jobs, "_print_to", lambda path: None)

    def run_trial(claim: Claim, *_: object) -> None:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        claim.give_back()

    monkeypatch.setattr("mpcli.sweep.trial.run_trial", run_trial)
    assert jobs._run(work, mock.Mock()) == Exit.DONE
    assert seen == [gpu or "5,7"]


class Stillborn:
    """What is known of a process that died before it had taken a cell."""

    trial_id = error = None

    def __init__(self, work: object) -> None:
        ended, alive = os.pipe()
        os.close(alive)
        self.process = mock.Mock(sentinel=ended, exitcode=9)

    def listen(self) -> None: ...

    def close(self) -> None:
        os.close(self.process.sentinel)


def test_a_sweep_whose_processes_die_at_once_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []
    monkeypatch.setattr(jobs, "_Job", lambda work: began.append(1) or Stillborn(work))
    loaded, folder = small_recipe(tmp_path), tmp_path / "sweep"
    with pytest.raises(UserError, match=r"die before they begin \(exit code 9\)") as told:
        run_sweep(
            folder, loaded, CELLS, kind="grid", asked={}, storage=None, jobs=1, tell=print,
        )  # fmt: skip
    assert told.value.exit_code is Exit.ENVIRONMENT
    assert len(began) == jobs.MAX_BARREN
    assert all(standing.waiting for standing in study_of(folder).look(CELLS).values())


@pytest.mark.slow
def test_two_processes_join_one_study_in_a_folder(tmp_path: Path) -> None:
    """They begin together; a trial that is killed is tried again, and both have all results."""
    folder = tmp_path / "sweep"
    with sweeping(folder, STEPS, jobs=1) as one, sweeping(folder, STEPS, jobs=1) as other:
        wait_for(folder, "trials/*/steps.jsonl", one)
        assert "libtorch_cpu" in server_of(one)
        kill_a_trial(folder, one, other)
        first, second = finished(one), finished(other)
    assert first == second
    assert [(t["label"], t["seed"]) for t in first] == [(c.label, c.seed) for c in CELLS]
    assert {(t["status"], t["steps"]) for t in first} == {("done", 200)}
    study = study_of(folder)
    assert complete(study) == NAMES
    assert [t.state for t in study.optuna.trials].count(TrialState.FAIL) == 1
    assert sorted(attempts for attempts, _ in done_runs(folder).values()) == [1, 1, 1, 2]
    assert gone(folder)


def server_of(sweep: subprocess.Popen[str]) -> str:
    """What the process has in its memory that the trials are forked from."""
    children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
    found = [pid for pid in children if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (server,) = found
    return Path(f"/proc/{server}/maps").read_text()


def kill_a_trial(folder: Path, *sweeps: subprocess.Popen[str]) -> None:
    """One that is running."""
    known = {process.pid for process in sweeps}
    os.kill(next(pid for pid in processes_of(folder) if pid not in known), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, Exit.INTERRUPTED),
        pytest.param(signal.SIGTERM, Exit.PREEMPTED, marks=pytest.mark.verify),
    ],
)
def test_a_stopped_sweep_leaves_checkpoints(
    tmp_path: Path, number: signal.Signals, code: Exit
) -> None:
    folder = tmp_path / "sweep"
    with sweeping(folder, "train.steps=3000") as process:
        wait_for(folder, "trials/*/steps.jsonl", process, 2)
        os.killpg(process.pid, number)  # as terminals and batch systems do
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert gone(folder)
    assert "Traceback" not in err
    assert len(list(folder.glob("trials/*/checkpoints/step-*/manifest.json"))) == 2
    study = study_of(folder)
    study.revive(CELLS)
    assert all(standing.waiting for standing in study.look(CELLS).values())


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a database of its own, which only this machine can reach."""

    def initdb() -> str | None:
        there = map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))  # Debian's place
        return shutil.which("initdb") or next(there, None)

    lock = tmp_path_factory.getbasetemp().parent / "postgresql.lock"
    programs = Path(program(initdb, lock, "postgresql")).resolve().parent
    home = Path("/tmp") / f"mptrain-postgres-{os.getpid()}"  # a socket's path is short
    home.mkdir(mode=0o700)
    user: list[str] = []
    if os.geteuid() == 0:  # which PostgreSQL refuses
        shutil.chown(home, "postgres")
        user = ["runuser", "-u", "postgres", "--"]

    def run(*command: str | Path) -> None:
        subprocess.run([*user, *command], check=True, capture_output=True, cwd="/", timeout=60)

    server = (programs / "pg_ctl", "-D", home / "data")
    options = f"-k {home} -c listen_addresses= -c fsync=off"
    try:
        run(programs / "initdb", "-D", home / "data", "-A", "trust", "-U", "sweeper", "--no-sync")
        run(*server, "-w", "-o", options, "-l", home / "log", "start")
        try:
            run(programs / "createdb", "-h", home, "-U", "sweeper", "sweeps")
            yield f"postgresql://sweeper:secret@/sweeps?host={home}"
        finally:
            run(*server, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)


@pytest.mark.slow
def test_machines_join_one_study_in_postgresql(tmp_path: Path, postgres: str) -> None:
    """Two begin together, each with a folder of its own, and the first dies with its trial.

    A killed trial is tried again by its machine, that of the dead one when its heart has stopped.
    """
    steps = "train.steps=400"
    folders = [tmp_path / name / "sweep" for name in "ab"]
    for folder in folders:
        folder.parent.mkdir()
    here, there = (sweeping(folder, steps, jobs=1, storage=postgres) for folder in folders)
    with here as one, there as other:
        wait_for(folders[1], "trials/*/steps.jsonl", other)
        kill_a_trial(folders[1], other)
        wait_for(folders[0], "trials/*/steps.jsonl", one)
        one.kill()
        first = finished(other)
    with sweeping(folders[0], steps, jobs=1, storage=postgres) as again:
        assert finished(again) == first
    assert [trial["status"] for trial in first] == ["done"] * len(CELLS)
    study = study_of(folders[0], postgres)
    assert complete(study) == NAMES
    assert [t.state for t in study.optuna.trials].count(TrialState.FAIL) == 2
    runs = [done_runs(folder) for folder in folders]
    assert sorted([*runs[0], *runs[1]]) == NAMES
    for folder in folders:
        assert not (folder / "study.journal").exists()
        for path in folder.rglob("*"):
            assert path.is_dir() or b"secret" not in path.read_bytes()
