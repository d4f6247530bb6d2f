"""`mptrain run --resume`, and signals to real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpcli.recipe.errors import Exit

MPTRAIN = Path(sys.executable).with_name("mptrain")
BEGIN = "import sys; print('begin', flush=True); from mpcli.cli import main; sys.exit(main())"
ENDLESS = ("--set", "train.steps=100000", "--set", "output.checkpoint_every=40 steps")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_finished_run_is_left_as_it_is(mptrain, recipe):
    assert mptrain("run", recipe.name, "--output", "out").code == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    outcome = mptrain("run", "--resume", "out", "--json")
    assert outcome.code == 0
    assert outcome.json == json.loads(Path("out/result.json").read_text())
    assert "nothing to do" in outcome.err
    assert mptrain("run", "--resume", "out", "--set", "train.steps=3").code == 0
    after = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert after == before


def test_more_steps_are_a_second_attempt(mptrain, recipe):
    mptrain("run", recipe.name)
    outcome = mptrain("run", "--resume", "runs/tiny/latest", "--set", "train.steps=9", "--json")
    assert (outcome.code, outcome.json["steps_attempted"]) == (0, 9)
    assert "going on from step 6" in outcome.err
    assert "9 steps instead of 6" in outcome.err
    assert Path("runs/tiny/latest/attempts/2/plan.json").exists()
    rows = Path("runs/tiny/latest/steps.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 10))


def test_another_learning_rate_or_precision_exits_2_with_the_differences(mptrain, recipe):
    mptrain("run", recipe.name, "--output", "out")
    outcome = mptrain(
        "run", "--resume", "out", "--set", "optim.lr=0.2", "--set", "precision.mode=bf16",
        "--set", "train.steps=9", "--json",
    )  # fmt: skip
    assert outcome.code == Exit.USAGE
    messages = {p["path"]: p["message"] for p in outcome.json["problems"]}
    assert messages["optim.lr"] == "the run has `0.1`, found `0.2`"
    assert messages["precision.mode"] == "the run has `fp16`, found `bf16`"
    assert "train.steps" not in messages
    assert {p["file"] for p in outcome.json["problems"]} == {"--set"}
    assert not Path("out/attempts/2").exists()
    assert mptrain("run", "--resume", "out").code == 0  # the lock was given back


def test_an_output_that_holds_a_run_names_resume(mptrain, recipe):
    mptrain("run", recipe.name, "--output", "out")
    outcome = mptrain("run", recipe.name, "--output", "out")
    assert outcome.code == 2
    assert "go on with the run: `--resume out`" in outcome.err


def test_the_newest_run_is_named_where_its_parent_was_meant(mptrain, recipe):
    mptrain("run", recipe.name)
    outcome = mptrain("run", "--resume", "runs/tiny")
    assert outcome.code == 2
    assert "help: `--resume runs/tiny/latest` is its newest run" in outcome.err


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """A run in a process of its own, as soon as Python itself is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN, "run", *arguments, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process


def wait_for_step(path: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the row of a step is in the file."""
    wanted = f'{{"step": {step},'
    while process.poll() is None:
        if path.exists() and wanted in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def ended(process: subprocess.Popen[str], number: int) -> tuple[int, dict[str, object], str]:
    """Exit code, the JSON and stderr of a process that gets a signal now."""
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert "Traceback" not in err
    return process.returncode, json.loads(out) if out else {}, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "status"),
    [(signal.SIGTERM, 75, "preempted"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_in_training_leaves_a_checkpoint_of_its_last_step(recipe, number, code, status):
    process = started(recipe, *ENDLESS, "--output", "out")
    wait_for_step(Path("out/steps.jsonl"), 50, process)
    returned, told, _ = ended(process, number)
    assert (returned, told["status"], told["exit_code"]) == (code, status, code)
    assert told == json.loads(Path("out/result.json").read_text())
    steps = told["steps_attempted"]
    assert told["checkpoint"] == f"checkpoints/step-{steps}"
    assert len(Path("out/steps.jsonl").read_text().splitlines()) == steps
    resumed = subprocess.run(
        [MPTRAIN, "run", "--resume", "out", "--set", f"train.steps={steps + 3}", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(resumed.stdout)["steps_attempted"] == steps + 3, resumed.stderr


@pytest.mark.slow
def test_sigterm_at_any_moment_of_the_start_exits_75(recipe):
    for tenths in (0.5, 2, 5, 10, 15, 20, 30, 40):
        process = started(recipe, *ENDLESS)
        time.sleep(tenths / 10)
        code, told, err = ended(process, signal.SIGTERM)
        assert code == 75, (tenths, err)
        if told:  # before, the command line itself is not loaded
            assert (told["status"], told["exit_code"]) == ("preempted", 75)


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_end_and_another_process_is_refused(recipe):
    length = ("--set", "train.steps=60", "--set", "output.checkpoint_every=20 steps")
    whole = subprocess.run([MPTRAIN, "run", recipe, *length, "--output", "whole"])
    assert whole.returncode == 0
    process = started(recipe, *length, "--output", "out")
    wait_for_step(Path("out/steps.jsonl"), 30, process)
    os.kill(process.pid, signal.SIGSTOP)  # alive, and holding the lock
    second = subprocess.run([MPTRAIN, "run", "--resume", "out"], capture_output=True, text=True)
    assert second.returncode == 2
    assert f"another process ({process.pid}) writes to this run" in second.stderr
    process.kill()
    process.communicate()
    resumed = subprocess.run([MPTRAIN, "run", "--resume", "out"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    final = "final/model.safetensors"
    assert Path("out", final).read_bytes() == Path("whole", final).read_bytes()
