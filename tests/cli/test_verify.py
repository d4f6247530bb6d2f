"""`mptrain diagnose --verify`."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from mpcli.diagnose.finding import Finding, Suggestion
from mpcli.records import ForeignRun
from mpcli.rundir import RunDirectory
from tests.diagnose.test_verify import contents
from tests.small import run_small

FOUND = Finding(
    id="underflow",
    severity="error",
    cause="the loss scale is too low",
    phase="backward",
    step=2,
    confidence=1,
    evidence={},
    suggestion=Suggestion(what="bf16", set=("precision.mode=fp32",)),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Four steps under a scale that is too low by far."""
    low = "precision={mode: fp16, loss_scale: {kind: static, scale: 1e-6}}"
    run, _ = run_small(tmp_path_factory.mktemp("run"), low)
    return run


@pytest.fixture(autouse=True)
def one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcli.diagnose.checks.CHECKS", (lambda evidence: [FOUND],))


def test_the_suggestion_is_tried_and_nothing_is_written(mptrain, run):
    before = contents(run)
    outcome = mptrain("diagnose", run.path, "--no-replay", "--verify", "--steps", "2", "--json")
    assert outcome.code == 0
    (found,) = outcome.json["findings"]
    assert found["verified"] is True
    (trial,) = found["tried"]
    assert trial["fixed"] and trial["checkpoint"] is None
    assert trial["without"]["steps"] == trial["with_it"]["steps"] == 4
    assert set(trial["with_it"]) == {
        *("steps", "skipped", "loss", "symptom", "seconds_per_step", "peak_memory_bytes"),
    }
    assert "as the run was: steps 1 to 4 from fresh weights" in outcome.err
    assert "with `precision.mode=fp32`: steps 1 to 4 from fresh weights" in outcome.err
    assert "it helps: " in outcome.err
    assert contents(run) == before


def test_without_the_option_nothing_is_tried(mptrain, run):
    (found,) = mptrain("diagnose", run.path, "--no-replay", "--json").json["findings"]
    assert (found["verified"], found["tried"], found["not_tried"]) == (None, [], None)


def test_what_has_no_steps_is_refused(mptrain, run, tmp_path):
    about = ForeignRun(
        loop="pytorch", model="M", parameters=1, optimizer="SGD", scaler=None, every=1
    )
    foreign = RunDirectory.create_foreign(about, {}, tmp_path / "foreign")
    foreign.close()
    weights = next((run.path / "checkpoints").iterdir())
    for place, why in ((weights, "it is no run"), (foreign.path, "not mptrain's")):
        outcome = mptrain("diagnose", place, "--verify")
        assert outcome.code == 2 and why in outcome.err and "--verify" in outcome.err


@pytest.mark.parametrize("given", [["--steps", "3"], ["--verify", "--steps", "0"]])
def test_steps_are_those_of_a_verification(mptrain, run, given):
    outcome = mptrain("diagnose", run.path, "--no-replay", *given)
    assert outcome.code == 2 and "--steps" in outcome.err


INTERRUPTED = """
import sys, time
from mpcli.cli import main
import mpcli.diagnose.checks as checks
from mpcli.diagnose import verify
from tests.cli.test_verify import FOUND
checks.CHECKS = (lambda evidence: [FOUND],)
def slowly(*given):
    print("there", flush=True)
    time.sleep(60)
verify.run_steps = slowly
sys.exit(main())
"""


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(run):
    before = contents(run)
    command = ["diagnose", run.path, "--no-replay", "--verify"]
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        while process.stdout.readline() not in ("there\n", ""):
            pass  # tables of the run
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert contents(run) == before
