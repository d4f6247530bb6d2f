"""`mptrain runs`: states, columns, order, what is not a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mpcli.cli.runs import _ORDERS
from mpcli.states import STATES
from tests import snapshots
from tests.synthetic_runs import all_states, make_run

COUNTS = {
    "running": 2, "done": 7, "diverged": 2, "failed": 2, "killed": 2, "preempted": 1,
    "interrupted": 1, "recorded": 1, "unreadable": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with 20 runs in all states."""
    folder = tmp_path_factory.mktemp("twenty")
    with ExitStack() as stack:
        all_states(folder, stack)
        yield folder


@pytest.mark.parametrize("columns", [80, 120])
def test_twenty_runs_in_all_states(there, monkeypatch, columns):
    snapshots.check(f"runs-{columns}.txt", snapshots.on_a_terminal(monkeypatch, columns, "runs"))


def test_json_has_every_run_and_its_numbers(there, mptrain):
    found = mptrain("runs", "--json").json
    assert (found["status"], found["exit_code"], found["folder"]) == ("done", 0, "runs")
    runs = {run["path"]: run for run in found["runs"]}
    names = [run["state"] for run in found["runs"]]
    assert {name: names.count(name) for name in names} == COUNTS
    running = runs["runs/running"]
    assert running["metric"] == {"split": "eval", "name": "accuracy", "value": 0.8833}
    assert (running["steps"], running["planned_steps"], running["mode"]) == (420, 1000, "fp16")
    assert running["wall_seconds"] == pytest.approx(60 * (200 - 7 * 16))
    assert runs["runs/killed"]["wall_seconds"] == pytest.approx(90 + 100 * 11)
    assert runs["runs/no-space"]["why"] == "it failed"
    assert runs["runs/damaged-result"]["why"] == "result.json cannot be read"


@pytest.mark.parametrize("order", _ORDERS)
def test_every_order_has_every_run(there, mptrain, order):
    runs = mptrain("runs", "--sort", order, "--json").json["runs"]
    assert len(runs) == 20
    if order == "metric":
        accuracies = [run["metric"]["value"] for run in runs if _is_accuracy(run)]
        assert accuracies == sorted(accuracies, reverse=True)
        assert all(map(_is_accuracy, runs[: len(accuracies)]))
        assert runs[-1]["metric"] is None
    if order in ("time", "size"):
        column = {"time": "wall_seconds", "size": "size_bytes"}[order]
        values = [run[column] or 0 for run in runs]
        assert values == sorted(values, reverse=True)
    if order == "started":
        assert runs[0]["path"] == "runs/lost-recipe" or runs[0]["started"] >= runs[1]["started"]
        times = [run["started"] for run in runs if run["started"] is not None]
        assert len(times) > 10 and times == sorted(times, reverse=True)
    if order == "name":
        assert [run["path"] for run in runs] == sorted(run["path"] for run in runs)
    if order == "state":
        found = list(dict.fromkeys(run["state"] for run in runs))
        assert found == [state for state in STATES if state in COUNTS]


def _is_accuracy(run):
    return bool(run["metric"]) and run["metric"]["name"] == "accuracy"


def test_states_filter(there, mptrain):
    found = mptrain("runs", "--state", "killed,diverged", "--json").json["runs"]
    assert sorted({run["state"] for run in found}) == ["diverged", "killed"]
    outcome = mptrain("runs", "runs/preempted", "--state", "running")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == "runs/preempted: no runs that are running, but 1 others\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing",), "missing: no such folder"),
        (("--state", "dnoe"), "--state dnoe: no run is ever that\n  help: did you mean `done`?"),
        (("--sort", "loss"), "invalid value for `--sort`: `loss` is not one of `state`, `name`"),
    ],
)
def test_mistakes_are_told(there, mptrain, arguments, message):
    outcome = mptrain("runs", *arguments)
    assert outcome.code == 2
    assert message in outcome.err


def test_links_are_not_followed_and_a_run_holds_no_runs(tmp_path, mptrain):
    run = make_run(tmp_path / "runs" / "one")
    make_run(run / "checkpoints" / "inner")
    (tmp_path / "runs" / "again").symlink_to("one")
    (tmp_path / "runs" / "upwards").symlink_to("..")
    found = mptrain("runs", tmp_path / "runs", "--json").json["runs"]
    assert [Path(one["path"]).name for one in found] == ["one"]


def test_a_folder_without_runs_is_no_failure(tmp_path, mptrain):
    (tmp_path / "recipe.yaml").write_text("name: not a run\n")
    outcome = mptrain("runs", tmp_path)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"{tmp_path}: no runs\n"


def test_names_of_strangers_do_not_move_the_cursor(tmp_path, mptrain):
    make_run(tmp_path / "\x1b[31mred\nline")
    out = mptrain("runs", tmp_path).out
    assert "\x1b" not in out
    assert "\\x1b[31mred\\x0aline" in out


@pytest.mark.slow
def test_none_of_the_three_imports_torch(there):
    code = (
        "import sys; from mpcli.cli.app import main; "
        "main(['runs']); main(['compare', 'runs/killed', 'runs/preempted']); "
        "main(['watch', 'runs/killed']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=there)
    assert done.returncode == 0, done.stderr
