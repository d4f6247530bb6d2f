"""What a run directory says at a glance, whatever is in it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpcli.cli.compare import compare
from mpcli.cli.errors import guarded
from mpcli.cli.runs import runs
from mpcli.cli.watch import watch
from mpcli.rundir import RunDirectory, find_runs, locks
from mpcli.states import STATES, Metric, judged_by, overview, state_of
from tests.synthetic_runs import begin_recording, begin_run, end_run, evaluation, make_run, row


@pytest.mark.parametrize("status", ["done", "diverged", "failed", "preempted", "interrupted"])
def test_a_run_is_running_until_its_lock_is_free(tmp_path, status):
    run = begin_run(tmp_path / "run")
    assert overview(run.path).state == "running"
    end_run(run, status)
    assert overview(run.path).state == status


def test_a_run_without_lock_and_result_was_killed(tmp_path):
    path = make_run(tmp_path / "run", status=None, done=7)
    found = overview(path)
    assert (found.state, found.steps, found.planned_steps) == ("killed", 7, 100)


def test_a_recording_is_running_and_then_recorded(tmp_path):
    run = begin_recording(tmp_path / "run")
    assert overview(run.path).state == "running"
    run.close()
    assert overview(run.path).state == "recorded"


def test_looking_takes_no_lock(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run")

    def taken(*arguments):
        raise AssertionError("the lock was touched")

    monkeypatch.setattr(fcntl, "flock", taken)
    assert overview(path).state == "done"


@pytest.mark.parametrize("table", [None, "/nowhere"])
def test_the_lock_of_another_process_is_seen_with_and_without_the_list_of_locks(
    tmp_path, monkeypatch, table
):
    path = make_run(tmp_path / "run")
    if table:
        monkeypatch.setattr(locks, "_TABLE", Path(table))
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path / "lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "\n"
        assert overview(path).state == "running"
        other.communicate("\n")
    assert overview(path).state == "done"


def test_the_list_of_locks_is_read_to_the_letter(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.write_text("42\n")
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    inode = status.st_ino
    for line, is_held in (
        (f"1: FLOCK  ADVISORY  WRITE 7 {device}:{inode} 0 EOF", True),
        (f"1: FLOCK  ADVISORY  WRITE 42 ff:ff:{inode} 0 EOF", True),  # btrfs
        (f"1: FLOCK  ADVISORY  WRITE 7 ff:ff:{inode} 0 EOF", False),
        (f"1: FLOCK  ADVISORY  READ  7 {device}:{inode} 0 EOF", False),
        (f"1: POSIX  ADVISORY  WRITE 7 {device}:{inode} 0 EOF", False),
        (f"1: -> FLOCK  ADVISORY  WRITE 7 {device}:{inode} 0 EOF", False),  # waits for it
        (f"1: FLOCK  ADVISORY  WRITE 7 {device}:{inode}1 0 EOF", False),
    ):
        table = tmp_path / "locks"
        table.write_text(f"9: POSIX  ADVISORY  READ 1 00:01:2 0 EOF\n{line}\n")
        monkeypatch.setattr(locks, "_TABLE", table)
        assert locks.is_held(path) is is_held, line


def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(tmp_path, monkeypatch):
    run = begin_run(tmp_path / "run")
    seen = iter([False, True])  # free too early, as for a resume that takes it

    monkeypatch.setattr(RunDirectory, "is_held", lambda self: next(seen))
    assert state_of(run)[0] == "running"
    run.close()


def test_a_run_is_judged_by_its_first_metric():
    assert judged_by({"eval": {"loss": 1.0, "f1": 0.5, "accuracy": 0.9}}) == Metric(
        "eval", "accuracy", 0.9
    )
    assert judged_by({"eval": {"loss": 1.0, "masked_accuracy": 0.4}}).name == "masked_accuracy"
    assert judged_by({"eval": {"loss": 1.0}, "train": {"loss": 2.0}}).value == 1.0
    assert judged_by({"train": {"loss": 2.0}}) == Metric("train", "loss", 2.0)
    assert judged_by({}) is None


def test_without_a_result_the_newest_rows_count(tmp_path):
    run = begin_run(tmp_path / "run")
    run.append_steps(row(step, loss=float(step)) for step in range(1, 101))
    assert overview(run.path).metric == Metric("train", "loss", 75.5)  # of the last 50
    run.append_evaluation(evaluation(100, accuracy=0.5))
    assert overview(run.path).metric == Metric("eval", "accuracy", 0.5)
    run.close()


JUNK = st.one_of(
    st.binary(max_size=200),
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10),
            st.sampled_from([10**400, -(10**400), 1e308, "nan", "\ud800", "\x1b[2J"]),
        ),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)  # fmt: skip
FILES = (
    "recipe.yaml", "result.json", "steps.jsonl", "evals.jsonl", "diagnosis.json", "lock",
    "attempts/1/plan.json", "attempts/1/environment.json", "foreign.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which nothing is damaged."""
    folder = tmp_path_factory.mktemp("whole")
    return make_run(folder / "run", metrics={"accuracy": 0.9}, done=10)


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_junk_in_any_file_is_told_and_not_raised(whole, tmp_path_factory, capsys, data):
    folder = tmp_path_factory.mktemp("junk")
    path = folder / "run"
    shutil.copytree(whole, path)
    for name in data.draw(st.sets(st.sampled_from(FILES), min_size=1, max_size=3)):
        (path / name).write_bytes(data.draw(JUNK))
    _commands(path, whole, capsys, as_json=data.draw(st.booleans()))


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_numbers_of_any_kind_in_its_records_are_told(whole, tmp_path_factory, capsys, data):
    folder = tmp_path_factory.mktemp("numbers")
    path = folder / "run"
    shutil.copytree(whole, path)
    name = data.draw(st.sampled_from(["result.json", "steps.jsonl", "attempts/1/plan.json"]))
    text = (
        (path / name).read_text().splitlines()[0]
        if name == "steps.jsonl"
        else ((path / name).read_text())
    )
    record = json.loads(text)
    number = st.sampled_from([0, -1, 10**30, 10**400, 1e308, -1e308, "nan", "inf", "-inf", 1e-320])
    for key in data.draw(st.sets(st.sampled_from(sorted(record)), min_size=1, max_size=3)):
        record[key] = data.draw(number)
    if name == "result.json":
        record["metrics"] = {"eval": {"accuracy": data.draw(number), "\x1b": data.draw(number)}}
    (path / name).write_text(json.dumps(record) + "\n")
    _commands(path, whole, capsys, as_json=data.draw(st.booleans()))


def _commands(path: Path, whole: Path, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    found = overview(path)
    assert found.state in STATES
    assert list(find_runs(path.parent)) == [path]
    for command, codes in (
        (lambda: runs(str(path.parent), as_json=as_json), (0,)),
        (lambda: compare([str(path), str(whole)], as_json=as_json), (0, 2)),
        *([] if as_json else [(lambda: watch(str(path)), (0, 2))]),
    ):
        code = guarded(command, as_json=as_json)
        out, err = capsys.readouterr()
        assert code in codes, err
        assert "Traceback" not in err
        assert "\x1b" not in out + err
        if as_json and out:
            json.loads(out)
