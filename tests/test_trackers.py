"""Trackers are read back with their own APIs; whatever one does, the run is what it is without."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpcli.machine import without_secrets
from mpcli.plan import make_plan
from mpcli.progress import Progress
from mpcli.records import EvalRecord, StepRecord, TrackerState
from mpcli.rundir import RunDirectory
from mpcli.rundir.rows import LONGEST_ROW, Tail
from mpcli.trackers import __main__ as process
from mpcli.trackers import display
from mpcli.trackers.base import About
from mpcli.trackers.mlflow import database_url
from tests.small import CPU, Silent, resume_small, run_small, small_recipe
from tests.stopped import EVERY_OTHER, kill_at, killed_run

SECRET = "0123456789abcdef" * 3
Point = tuple[int, float]


@pytest.fixture(autouse=True)
def _unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has set a tracker up on this machine, and there is time enough."""
    for name in tuple(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(display, "_PATIENCE", 600.0)
    monkeypatch.setattr(display, "_TIME_TO_REACH", 600.0)


def tensorboard(folder: Path) -> tuple[int, list[Point], list[Point]]:
    """Number of runs, losses, evaluations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    losses, evaluations = (
        [(event.step, event.value) for event in events.Scalars(name)]
        for name in ("train/loss", "eval/accuracy")
    )
    return 1, losses, evaluations


def mlflow(folder: Path) -> tuple[int, list[Point], list[Point]]:
    """By its client."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params["optim.lr"] == "0.1"
    assert runs[0].data.tags["mptrain.status"] == "done"
    losses, evaluations = (
        [(metric.step, metric.value) for metric in client.get_metric_history(run, name)]
        for run in [runs[0].info.run_id]
        for name in ("train/loss", "eval/accuracy")
    )
    return len(runs), losses, evaluations


def wandb(folder: Path) -> tuple[int, list[Point], list[Point]]:
    """By `wandb leet inspect`: W&B has no other reader of its offline files."""
    identities, rows = set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for record in text.split("\n# record "):
            words = record.split()
            if "run_id:" in words:
                identities.add(words[words.index("run_id:") + 1])
            keys = (json.loads(b) for a, b in itertools.pairwise(words) if a.endswith("key:"))
            values = (json.loads(b) for a, b in itertools.pairwise(words) if a == "value_json:")
            if record.partition("\n")[0].endswith("history"):
                rows.append({key: float(value) for key, value in zip(keys, values, strict=True)})
    losses, evaluations = (
        [(int(row["step"]), row[name]) for row in rows if name in row]
        for name in ("train/loss", "eval/accuracy")
    )
    return len(identities), losses, evaluations


def trackio(folder: Path) -> tuple[int, list[Point], list[Point]]:
    """By its API, in a process of its own: it reads its folder's name when it is imported."""
    program = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as storage\n"
        "runs = list(trackio.Api().runs('small'))\n"
        "assert runs[0].config['optim']['lr'] == 0.1\n"
        "print(json.dumps([len(runs), storage.get_logs('small', runs[0].name)]))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(folder)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    runs, rows = json.loads(done.stdout.splitlines()[-1])
    losses, evaluations = (
        [(row["step"], row[name]) for row in rows if name in row]
        for name in ("train/loss", "eval/accuracy")
    )
    return runs, losses, evaluations


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nobody waits
@pytest.mark.parametrize("reader", [tensorboard, mlflow, wandb, trackio])
def test_a_killed_and_resumed_run_is_one_run_that_has_every_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    reader: Callable[[Path], tuple[int, list[Point], list[Point]]],
) -> None:
    name = reader.__name__
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", SECRET)
        kill_at(patch, 4)
        run = killed_run(tmp_path, f"output.trackers=[{name}]", EVERY_OTHER)
    while run.tracker_state(name).step < 3:  # of which the checkpoint knows two
        time.sleep(0.1)
    with run.tracking(name):  # its process ends, for the training is gone
        before = run.tracker_state(name)
    result = resume_small(run)
    assert (result.status, result.problems) == ("done", ())
    assert run.tracker_state(name) == TrackerState(run=before.run, step=4, evaluated=4)
    said = "nobody is logged in" in RunDirectory.read(run.path).log_path.read_text()
    assert said is (name == "wandb")
    assert capfd.readouterr().out == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "small.yaml", "home"}
    assert not any(SECRET.encode() in path.read_bytes() for path in files(run.path))

    runs, losses, evaluations = reader(run.tracker_path(name))
    assert runs == 1
    assert dict(losses) == pytest.approx({row.step: row.loss for row in run.steps()})
    assert dict(evaluations) == pytest.approx({4: result.metrics["eval"]["accuracy"]})
    again = [] if name == "tensorboard" else [3]  # nothing else takes a point back
    assert sorted(step for step, _ in losses) == sorted([1, 2, 3, 4, *again])


def files(folder: Path) -> Iterator[Path]:
    """All files below a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_server_out_of_reach_is_one_warning_without_its_password(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.setattr(display, "_PATIENCE", 20.0)  # it is tried to the end
    run, result = run_small(tmp_path, "output.trackers=[mlflow]")
    assert (result.status, result.exit_code, result.steps_applied) == ("done", 0, 4)
    (problem,) = result.problems
    assert problem["message"].startswith("tracker mlflow: ")
    assert problem["severity"] == "warning"
    assert len(list(run.steps())) == 4
    assert not any(SECRET.encode() in path.read_bytes() for path in files(run.path))


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import time; time.sleep(10000)", "was not ready 0 s after the training"),
        ("raise SystemExit(3)", "its process ended with 3"),
        (r"""print('["warning", "first"]\n["warning", "second"]')""", "first"),
        (
            r"""print('hello\n["it"]\n["warning", 1]\n' + 9999 * '[' + '\n["warning", "it"]')""",
            "it",
        ),
    ],
)
def test_the_training_waits_for_no_tracker(tmp_path, monkeypatch, program, told):
    # The first one answers nothing for ever: whatever waited for it before the end would hang.
    plain, _ = run_small(tmp_path, name="plain")
    monkeypatch.setattr(display, "_COMMAND", (sys.executable, "-c", program))
    if "sleep" in program:
        monkeypatch.setattr(display, "_PATIENCE", 0.0)
    started = []
    popen = subprocess.Popen

    def remember(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(display.subprocess, "Popen", remember)
    run, result = run_small(tmp_path, "output.trackers=[tensorboard]")
    assert (result.status, result.exit_code) == ("done", 0)
    assert [problem["message"] for problem in result.problems] == [f"tracker tensorboard: {told}"]
    (tracker,) = started
    assert tracker.returncode is not None
    model = "final/model.safetensors"
    assert (run.path / model).read_bytes() == (plain.path / model).read_bytes()


def test_only_rank_0_has_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr(display, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    assert [len(tracked_to_the_end(tmp_path, rank).warnings) for rank in (0, 1)] == [1, 0]


def test_a_run_that_is_killed_while_it_waits_for_trackers_has_its_result(tmp_path, monkeypatch):
    found, waited = [], display.Tracked.finish

    def finish(self, status):
        found.append(self._run.result())
        time.sleep(1)
        self._warn("tensorboard", "late")
        waited(self, status)

    monkeypatch.setattr(display, "_COMMAND", (sys.executable, "-c", ""))
    monkeypatch.setattr(display.Tracked, "finish", finish)
    run, result = run_small(tmp_path, "output.trackers=[tensorboard]")
    (before,) = found
    assert (before.status, before.problems, before.metrics) == ("done", (), result.metrics)
    assert run.result() == result
    assert [problem["message"] for problem in result.problems] == ["tracker tensorboard: late"]
    assert result.wall_seconds < before.wall_seconds + 1  # the waiting is not counted


def test_a_signal_that_comes_while_trackers_are_waited_for_shortens_that(tmp_path, monkeypatch):
    monkeypatch.setattr(display, "_COMMAND", (sys.executable, "-c", "input(); input()"))
    monkeypatch.setattr(display, "_PATIENCE", 20.0)
    monkeypatch.setattr(display, "_SHORT_PATIENCE", 0.5)
    asked = iter([None, None])
    monkeypatch.setattr(display, "asked", lambda: next(asked, signal.SIGTERM))
    progress = tracked_to_the_end(tmp_path)
    (problem,) = progress.warnings
    assert problem.what == "tracker tensorboard: was not ready 0.5 s after the training"


@pytest.mark.parametrize(
    ("said", "seconds"), [("[]", 0.2), ('["reached", ""]', 1.5)], ids=["never", "reached"]
)
def test_what_never_was_in_reach_and_does_not_answer_is_not_waited_for_long(
    tmp_path, monkeypatch, said, seconds
):
    begun = tmp_path / "begun"
    program = (
        f"import time; print({said!r}, flush=True); open({str(begun)!r}, 'w'); time.sleep(10000)"
    )

    def wait() -> None:
        while not begun.exists():
            time.sleep(0.01)

    monkeypatch.setattr(display, "_COMMAND", (sys.executable, "-c", program))
    monkeypatch.setattr(display, "_PATIENCE", 1.5)
    monkeypatch.setattr(display, "_SHORT_PATIENCE", 0.2)
    monkeypatch.setattr(display, "_TIME_TO_REACH", 0.0)
    (problem,) = tracked_to_the_end(tmp_path, first=wait).warnings
    assert problem.what == f"tracker tensorboard: was not ready {seconds:g} s after the training"


def test_signals_to_the_process_group_do_not_reach_trackers(tmp_path, monkeypatch):
    program = (
        "import os, signal\n"
        "for number in (signal.SIGINT, signal.SIGTERM): os.kill(os.getpid(), number)\n"
        """print('["warning", "alive"]')"""
    )
    monkeypatch.setattr(display, "_COMMAND", (sys.executable, "-c", program))
    (problem,) = tracked_to_the_end(tmp_path).warnings
    assert problem.what == "tracker tensorboard: alive"


def tracked_to_the_end(
    folder: Path, rank: int = 0, first: Callable[[], object] = lambda: None
) -> Progress:
    """Of a run that ends at once, beside a tracker."""
    recipe = small_recipe(folder, "output.trackers=[tensorboard]").recipe
    progress, run = Progress(), RunDirectory.join(folder, 1, rank)
    with display.Tracked(Silent(), run, progress) as tracked:
        tracked.start(make_plan(recipe, CPU), recipe)
        first()
        tracked.finish("done")
    return progress


def test_a_tracker_of_an_attempt_before_the_newest_passes_nothing_on(tmp_path):
    run, _ = run_small(tmp_path)
    program = (
        "from mpcli.trackers import __main__ as process\n"
        "process.follow = lambda *arguments: process.os._exit(7)\n"
        "process.main()"
    )
    command = [sys.executable, "-c", program, "tensorboard", str(run.path), "1", "0"]
    assert subprocess.run(command, check=False).returncode == 7
    (run.path / "attempts" / "2").mkdir()
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
def test_a_database_that_is_half_made_is_made_anew(tmp_path):
    pytest.importorskip("mlflow")
    run, _ = run_small(tmp_path)
    folder = run.tracker_path("mlflow")
    command = [sys.executable, "-P", "-m", "mpcli.trackers", "mlflow", str(run.path), "1", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as tracker:
        while not any(map(has_table, folder.glob("mlflow.db*"))):
            time.sleep(0.001)
        tracker.kill()
    done = subprocess.run(command, input=b"done", capture_output=True, check=True)
    assert done.stdout == b'["reached", ""]\n'
    runs, losses, _ = mlflow(folder)
    assert (runs, len(losses)) == (1, 4)


@pytest.mark.parametrize("name", ["a?b", "50%25", "50%", "a#b", "a b"])
def test_a_database_lies_in_its_folder_whatever_that_is_called(tmp_path, name):
    sqlalchemy = pytest.importorskip("sqlalchemy", minversion="2.1")  # which quotes names
    database = tmp_path / name / "mlflow.db"
    database.parent.mkdir()
    with contextlib.closing(sqlalchemy.create_engine(database_url(database)).connect()):
        assert database.exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def has_table(path: Path) -> bool:
    """Whether a database has a table that a migration makes which cannot be made again."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
        query = "SELECT name FROM sqlite_master WHERE name = 'evaluation_datasets'"
        return database.execute(query).fetchone() is not None
    return False


class Flaky:
    """A tracker that fails at the first two calls of each kind, also when it is made."""

    calls: dict[str, int]
    rows: list[tuple[str, int]]

    def __init__(self, about: About, say: Callable[[str], None]) -> None:
        Flaky.rows = []
        self.call("make")

    def call(self, kind: str) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        if self.calls[kind] <= 2:
            raise ConnectionError(f"no way to {kind}\nwhich is long")

    def begin(self) -> str:
        self.call("begin")
        return "it"

    def steps(self, rows: Sequence[StepRecord]) -> None:
        self.call("steps")
        self.rows += [("step", row.step) for row in rows]

    def evaluated(self, row: EvalRecord) -> None:
        self.call("evaluated")
        self.rows.append(("evaluation", row.step))

    def finish(self, status: str) -> None:
        self.call("finish")
        self.rows.append((status, 0))


def followed(
    monkeypatch: pytest.MonkeyPatch,
    run: RunDirectory,
    step: int = 0,
    heard: Sequence[str | None] = (*[None] * 9, "done"),
) -> list[tuple[str, str]]:
    """What a flaky tracker's process says, that is told the end when it has had time."""
    monkeypatch.setitem(process.TRACKERS, "tensorboard", Flaky)
    Flaky.calls = {}
    statuses = iter(heard)
    monkeypatch.setattr(process, "_status", lambda seconds: next(statuses, None))
    said: list[tuple[str, str]] = []
    process.follow(run, "tensorboard", step, lambda *what: said.append(what))
    return said


def test_what_fails_is_told_once_and_made_again_until_nothing_is_missing(tmp_path, monkeypatch):
    run, _ = run_small(tmp_path)
    with run.tracking("tensorboard"):
        warning = ("warning", "ConnectionError: no way to make")
        assert followed(monkeypatch, run) == [warning, ("reached", "")]
        every = [*(("step", n) for n in (1, 2, 3, 4)), ("evaluation", 4), ("done", 0)]
        assert Flaky.rows == every
        assert run.tracker_state("tensorboard") == TrackerState(run="it", step=4, evaluated=4)
        followed(monkeypatch, run, step=2)  # taken back to a checkpoint
        assert Flaky.rows == every[2:]
        (run.tracker_path("tensorboard") / "run.json").write_bytes(b'{"step": "\xff')
        followed(monkeypatch, run, step=2)  # which says nothing: all of them
        assert Flaky.rows == every


def test_the_end_is_tried_as_long_as_the_training_waits_for_it(tmp_path, monkeypatch):
    run, _ = run_small(tmp_path)
    with run.tracking("tensorboard"):
        followed(monkeypatch, run)
        assert Flaky.rows[-1] == ("done", 0)
        assert set(Flaky.calls.values()) == {3}
        followed(monkeypatch, run, heard=[*[None] * 9, "done", "killed"])  # while it waited
        assert Flaky.calls["finish"] == 2


@pytest.mark.parametrize("end", ["done", "killed"])
def test_the_end_of_a_training_does_not_wait_for_what_never_was_in_reach(
    tmp_path, monkeypatch, end
):
    run, _ = run_small(tmp_path)
    with run.tracking("tensorboard"):
        said = followed(monkeypatch, run, heard=[None, end])
        assert said == [("warning", "ConnectionError: no way to make")]
        assert Flaky.calls == {"make": 2}


def test_a_tail_gives_whole_rows_and_passes_over_what_is_none(tmp_path):
    path = tmp_path / "evals.jsonl"
    tail = Tail(path, EvalRecord)
    assert tail.read(5) == []
    rows = [EvalRecord(step=n, attempt=1, loss=0.5, ema=False, seconds=1) for n in range(4)]
    lines = [row.to_json() + "\n" for row in rows]
    junk = ["no row\n", "x" * LONGEST_ROW + "\n", "[" * 9999 + "\n"]
    path.write_text("".join([lines[0], *junk, lines[1], lines[2], lines[3][:20]]))
    assert tail.read(2) == tail.read(2) == rows[:2]
    tail.advance()
    assert tail.read(5) == rows[2:3]
    tail.advance()
    assert tail.read(5) == []
    with path.open("a") as file:
        file.write(lines[3][20:])
    assert tail.read(5) == rows[3:]


def test_secrets_are_cut_out_of_what_is_said(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert SECRET not in without_secrets(f"key {SECRET} is wrong")
    assert without_secrets("to http://me:password@host:1/x") == "to http://***@host:1/x"
    assert without_secrets("nothing here") == "nothing here"
