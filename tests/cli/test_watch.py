"""`mptrain watch`: what it shows while a run goes on, and how it ends."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console

from mpcli.cli import live
from mpcli.cli import watch as watch_command
from mpcli.cli.live import sparkline
from mpcli.records import Heartbeat, strict_json
from mpcli.rundir import RunDirectory
from mpcli.watching import Course
from tests import snapshots
from tests.cli.test_terminal import on_a_terminal
from tests.synthetic_runs import (
    begin_recording,
    begin_run,
    end_run,
    evaluation,
    make_run,
    row,
)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[Callable[[], object]]], None]:
    """Things that happen one after another, each while the command waits for the next look."""

    def happen(actions: Iterable[Callable[[], object]]) -> None:
        waiting = iter(actions)
        monkeypatch.setattr(watch_command.time, "sleep", lambda seconds: next(waiting)())

    return happen


def rows(run: RunDirectory, first: int, last: int, **changes: object) -> Callable[[], None]:
    """Steps that are made."""
    return lambda: run.append_steps(row(step, **changes) for step in range(first, last + 1))


def test_lines_follow_a_run_to_its_end(tmp_path, mptrain, meanwhile):
    run = begin_run(tmp_path / "run", "precision.mode=fp16")
    meanwhile([
        rows(run, 1, 9),
        rows(run, 10, 20, applied=False),
        lambda: run.append_evaluation(evaluation(20, accuracy=0.5)),
        rows(run, 21, 100),
        lambda: end_run(run),
    ])  # fmt: skip
    outcome = mptrain("watch", run.path)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "small: fp16 on cpu, 168 parameters, 1,437 samples, 100 steps"
    assert lines[1:5] == [
        "step 9/100  loss 1.667  scale 65536  skipped 0  0:01 left  1,000 samples/s",
        "step 20/100  loss 1.335  scale 65536  skipped 11  0:01 left  1,000 samples/s",
        "step 20: eval loss 0.5000, accuracy 50.00% (0.5 s)",
        "step 100/100  loss 0.2652  scale 65536  skipped 11  0:00 left  1,000 samples/s",
    ]
    assert lines[5] == "Result"
    assert any(line.split() == ["eval", "accuracy", "50.00%"] for line in lines)


def test_a_run_that_has_not_begun_is_waited_for(tmp_path, mptrain, meanwhile):
    place = tmp_path / "run"

    def begin() -> None:
        run = begin_run(place)
        end_run(run)

    meanwhile([lambda: None, begin])
    outcome = mptrain("watch", place)
    assert outcome.code == 0
    assert outcome.err == f"{place}: no run yet: waiting for one\n"
    assert "status         done" in outcome.out


def test_rows_that_a_resume_takes_back_are_forgotten(tmp_path, mptrain, meanwhile):
    run = begin_run(tmp_path / "run")

    def resume() -> None:
        for name in ("plan.json", "environment.json"):
            file = tmp_path / "run" / "attempts" / "2" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text((tmp_path / "run" / "attempts" / "1" / name).read_text())
        about = {"changes": ["rank 1 was killed by SIGKILL in step 40"]}
        (file.parent / "resumed.json").write_text(strict_json(about))

    meanwhile([
        rows(run, 1, 40, applied=False),
        resume,
        lambda: run.cut(20, 20),
        rows(run, 21, 40),
        lambda: end_run(run, "preempted"),
    ])  # fmt: skip
    outcome = mptrain("watch", run.path)
    assert outcome.code == 0
    assert "attempt 2: rank 1 was killed by SIGKILL in step 40" in outcome.out
    skips = [line.split("skipped ")[1][:2] for line in outcome.out.splitlines() if "loss 0" in line]
    assert skips[-1] == "20"


@pytest.mark.parametrize("status", ["diverged", "failed", "interrupted"])
def test_how_a_run_ended_is_no_failure_of_the_watch(tmp_path, mptrain, status):
    problem = {
        "file": None, "line": None, "column": None, "path": None, "message": "why it ended",
        "hint": "what helps", "severity": "error", "finding": None,
    }  # fmt: skip
    path = make_run(tmp_path / "run", status=status, done=3, result={"problems": (problem,)})
    outcome = mptrain("watch", path)
    assert outcome.code == 0
    assert f"status         {status}" in outcome.out
    assert outcome.err == "error: why it ended\n  help: what helps\n"


def test_a_killed_run_and_a_recording_have_no_result(tmp_path, mptrain, meanwhile):
    killed = make_run(tmp_path / "killed", status=None, done=7)
    outcome = mptrain("watch", killed)
    assert outcome.out.splitlines()[-1] == f"{killed}: was killed after step 7"
    assert outcome.err == f"`mptrain run --resume {killed}` goes on\n"
    recording = begin_recording(tmp_path / "recording")
    meanwhile([rows(recording, 1, 3), recording.close])
    outcome = mptrain("watch", recording.path)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "a pytorch loop: Net, 168 parameters, AdamW"
    assert lines[1].startswith("step 3  loss 1.882  scale 65536  skipped 0  1,000 samples/s")
    assert lines[-1] == f"{recording.path}: the recording ended after step 3"


def test_a_run_that_is_deleted_is_gone(tmp_path, mptrain, meanwhile):
    run = begin_run(tmp_path / "run")

    def delete() -> None:
        run.close()
        shutil.rmtree(run.path)

    meanwhile([rows(run, 1, 3), delete])
    outcome = mptrain("watch", run.path)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == f"{run.path}: is gone"


def test_ctrl_c_leaves_the_run_alone(tmp_path, mptrain, meanwhile):
    run = begin_run(tmp_path / "run")

    def interrupt() -> None:
        raise KeyboardInterrupt

    meanwhile([rows(run, 1, 3), interrupt])
    outcome = mptrain("watch", run.path)
    assert outcome.code == 130
    assert outcome.err == "error: interrupted; the run is left alone\n"
    assert run.is_held()
    run.close()


def test_the_newest_run_is_the_default(tmp_path, mptrain, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mptrain("watch").code == 2
    make_run(tmp_path / "runs" / "small" / "20270115T010000Z-1a2b3c41", done=2)
    (tmp_path / "runs" / "small" / "latest").symlink_to("20270115T010000Z-1a2b3c41")
    for arguments in ((), ("runs/small/latest",)):  # which may soon be another run's
        out = mptrain("watch", *arguments).out
        assert "run directory  runs/small/20270115T010000Z-1a2b3c41" in out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: place.write_text(""), "is a file"),
        (
            lambda place: (place / "notes").mkdir(parents=True),
            "not a run: no recipe.yaml, but notes",
        ),
    ],
)
def test_what_will_be_no_run_is_told(tmp_path, mptrain, make, message):
    make(tmp_path / "place")
    outcome = mptrain("watch", tmp_path / "place")
    assert outcome.code == 2
    assert message in outcome.err


def test_a_run_whose_folder_is_not_there_is_not_waited_for(tmp_path, mptrain):
    place = tmp_path / "rnus" / "small" / "latest"
    outcome = mptrain("watch", place)
    assert outcome.code == 2
    assert f"{place}: there is no folder {place.parent}" in outcome.err


@pytest.mark.slow
def test_a_reader_who_left_ends_the_watch(tmp_path, mptrain_process):
    run = begin_run(tmp_path / "run")
    outcome = mptrain_process("timeout 60 mptrain watch run | true")
    assert outcome.code == 0, outcome.err
    run.close()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_has_a_bar_a_loss_curve_and_all_processes(
    tmp_path, monkeypatch, meanwhile, columns
):
    run = begin_run(tmp_path / "run", "precision.mode=fp16", world_size=2)

    def beat() -> None:
        for rank in range(2):
            about = Heartbeat(rank=rank, pid=1, launcher=1, host="here", step=50 + rank)
            (run.attempt_path / f"rank{rank}.json").write_text(about.to_json())

    frames: list[str] = []
    drawn = live.LiveView._drawn

    def noted(self, watched, silent):
        found = drawn(self, watched, silent + 60 * (watched.last is not None))
        paper = Console(file=io.StringIO(), width=self._console.width)
        paper.print(found)
        frames.append(paper.file.getvalue())
        return found

    monkeypatch.setattr(live.LiveView, "_drawn", noted)
    meanwhile([
        beat,
        rows(run, 1, 50),
        lambda: run.append_evaluation(evaluation(50, accuracy=0.5)),
        rows(run, 51, 60, loss=float("nan"), applied=False),
        lambda: end_run(run),
    ])  # fmt: skip
    monkeypatch.chdir(tmp_path)
    text = snapshots.on_a_terminal(monkeypatch, columns, "watch", "run")
    assert "step 50: eval loss 0.5000, accuracy 50.00% (0.5 s)" in text
    shown = "\n".join(snapshots.plain(frame) for frame in frames)
    snapshots.check(f"watch-{columns}.txt", shown)


def test_a_sparkline_has_a_character_for_each_value():
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([1.0, float("nan"), 2.0, float("inf")]) == "▁×█×"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([float("nan")]) == "×"
    assert sparkline([-1e308, 1e308]) == "▁▁"  # too far apart to be subtracted


@pytest.mark.parametrize("steps", [1, 7, 239, 240, 241, 10_000])
def test_the_course_of_a_long_run_takes_little_room(steps):
    course = Course()
    for step in range(steps):
        course.add(float(step))
    means = course.means(40)
    assert 1 <= len(means) <= 40
    assert means == sorted(means)
    assert len(means) >= min(steps, 20)
    assert len(course.means(10_000)) <= 240


_WRITER = """
import sys, threading
from pathlib import Path
from tests.synthetic_runs import begin_run, end_run, row
run = begin_run(Path(sys.argv[1]), steps=100000)
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
step = 0
while not over.wait(0.01):
    step += 1
    run.append_steps([row(step, loss=1 / step)])
end_run(run, "preempted")
"""


@pytest.mark.slow
def test_a_run_of_another_process_is_watched_and_left_alone(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, tmp_path / "out"],
        stdin=subprocess.PIPE, cwd=Path(__file__).parents[2],
    ) as writer:  # fmt: skip
        code, shown = on_a_terminal(
            tmp_path, "watch", "out", columns=100, interrupt_after="samples/s"
        )
        assert code == 130, shown
        assert "\x1b[?25h" in shown  # the cursor is there again
        assert writer.poll() is None
    assert writer.returncode == 0
    code, shown = on_a_terminal(tmp_path, "watch", "out", columns=100)
    assert code == 0
    assert "preempted" in shown.rpartition("Result")[2]
