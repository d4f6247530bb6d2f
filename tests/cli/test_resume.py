"""`mptrain run --resume`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpcli.recipe.errors import Exit


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
