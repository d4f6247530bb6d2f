"""`mptrain plan` and `mptrain run`, in this process."""

from __future__ import annotations

import json
import shlex

import pytest

from mpcli.records import Result

UNSAFE = ("--set", "precision.loss_scale={kind: static, scale: 1e9}")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_plan_shows_values_with_their_origin_modules_and_totals(mptrain, recipe):
    outcome = mptrain("plan", recipe.name, "--set", "train.steps=9")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["optim.lr", "0.1", "tiny.yaml:5:24"] in rows
    assert ["train.seed", "0", "default"] in rows
    assert any(row[:2] == ["train.steps", "9"] and row[2] == "--set" for row in rows)
    assert any(row[-1:] == ["fp32"] or "Linear" in row for row in rows)
    assert ["steps", "9", "(89", "an", "epoch)"] in rows


def test_plan_json_is_one_object(mptrain, recipe):
    found = mptrain("plan", recipe.name, "--json", "--set", "optim={kind: adam, lr: 1e-3}").json
    assert (found.pop("status"), found.pop("exit_code")) == ("done", 0)
    assert set(found) == {"recipe", "origins", "dropped", "plan", "problems"}
    assert found["recipe"]["optim"]["kind"] == "adam"
    assert any("momentum" in message for message in found["dropped"])
    assert found["plan"]["steps"] == 6
    assert {m["stored"] for m in found["plan"]["modules"] if m["parameters"]} == {"fp32"}


def test_warnings_stand_at_their_place_and_carry_the_finding(mptrain, recipe):
    recipe.write_text(recipe.read_text().replace("fp16}", "fp16, loss_scale: {kind: none}}"))
    problems = mptrain("plan", recipe.name, "--json").json["problems"]
    (problem,) = [p for p in problems if p["path"] == "precision.loss_scale"]
    assert (problem["severity"], problem["finding"], problem["line"]) == ("warning", "underflow", 4)
    assert "tiny.yaml:4:" in mptrain("plan", recipe.name).err


@pytest.mark.parametrize(
    ("capacity", "overrides", "shown_first"),
    [
        (
            "1060KiB",
            [
                "precision.mode=fp32",
                "optim={kind: adamw, lr: 0.01}",
                "task.model.width=16",
                "train.global_batch_size=8",
            ],
            ["engine.activation_checkpointing", "optim.kind"],
        ),
        (
            "134KiB",
            ["precision.mode=fp32", "engine={kind: fsdp2, processes: 2, device: cpu}"],
            ["train.micro_batch_size", "engine.activation_checkpointing", "precision.mode"],
        ),
    ],
)
def test_a_change_that_is_shown_is_what_it_says_when_typed(
    mptrain, recipe, capacity, overrides, shown_first
):
    def plan(overrides, *options):
        given = [word for override in overrides for word in ("--set", override)]
        outcome = mptrain("plan", recipe.name, *given, *options)
        assert outcome.code == 0, outcome.err
        return outcome

    found = plan(overrides, "--capacity", capacity, "--json").json
    assert found["fits"] is False
    first = [change["set"][0].partition("=")[0] for change in found["changes"]]
    assert first[: len(shown_first)] == shown_first
    for change in found["changes"]:
        kept = [override for override in overrides if override not in change["instead_of"]]
        again = plan([*kept, *change["set"]], "--json").json
        assert again["plan"]["memory"] == change["memory"]
        assert change["memory"]["peak"] <= found["capacity_bytes"]
    answer = plan(overrides, "--capacity", capacity).out.partition("It does not fit")[2]
    assert max(map(len, answer.splitlines())) <= 80
    typed = [line for line in answer.splitlines() if line.startswith("    --set ")]
    shown = shlex.split("\n".join(typed))
    assert all(setting in shown for change in found["changes"] for setting in change["set"])


@pytest.mark.parametrize("command", ["plan", "run"])
def test_strict_makes_warnings_errors(mptrain, recipe, command):
    outcome = mptrain(command, recipe.name, "--strict", "--json", *UNSAFE)
    assert outcome.code == outcome.json["exit_code"] == 2
    assert "scale-too-high" in {p["finding"] for p in outcome.json["problems"]}
    assert {p["severity"] for p in outcome.json["problems"]} == {"error"}


@pytest.mark.parametrize("command", ["plan", "run"])
def test_errors_of_the_plan_stand_at_their_place(mptrain, recipe, command):
    recipe.write_text(recipe.read_text().replace("size: 16", "size: 160000"))
    outcome = mptrain(command, recipe.name, "--json")
    (problem,) = [p for p in outcome.json["problems"] if p["severity"] == "error"]
    assert outcome.code == 2
    assert (problem["line"], problem["path"]) == (6, "train.global_batch_size")
    assert not (recipe.parent / "runs").exists()


def test_run_ends_with_a_table_of_what_happened(mptrain, recipe):
    outcome = mptrain("run", recipe.name, "--output", "out")
    table = dict(line.split(maxsplit=1) for line in outcome.out.splitlines() if "  " in line)
    assert outcome.code == 0
    assert table["status"] == "done"
    assert table["steps"] in ("6 applied, 0 skipped", "5 applied, 1 skipped")
    assert "accuracy" in outcome.out
    assert outcome.out.rstrip().endswith("run directory  out")
    assert "step 6: eval loss" in outcome.err


def test_run_json_is_result_json(mptrain, recipe):
    outcome = mptrain("run", recipe.name, "--json")
    assert Result.model_validate(outcome.json).status == "done"
    latest = recipe.parent / "runs" / "tiny" / "latest"
    assert outcome.json == json.loads((latest / "result.json").read_text())
    assert json.loads((latest / "attempts/1/environment.json").read_text())["precisions"]["cpu"]


def test_a_run_that_diverges_says_why_and_exits_5(mptrain, recipe):
    overrides = ("--set", "precision.loss_scale={kind: static, scale: 1e38}")
    skips = ("--set", "train.max_consecutive_skips=2")
    outcome = mptrain("run", recipe.name, "--output", "out", *overrides, *skips)
    assert outcome.code == 5
    assert "diverged" in outcome.out
    assert "train.max_consecutive_skips" in outcome.err
    told = mptrain("run", recipe.name, "--json", *overrides, *skips).json
    assert (told["status"], told["exit_code"]) == ("diverged", 5)
    (problem,) = told["problems"]
    assert "steps in a row" in problem["message"]
    assert "mptrain diagnose" in problem["hint"]


def test_an_output_in_use_exits_2_and_an_unwritable_one_7(mptrain, recipe):
    (recipe.parent / "full").mkdir()
    (recipe.parent / "full" / "file").write_text("")
    assert mptrain("run", recipe.name, "--output", "full").code == 2
    assert mptrain("run", recipe.name, "--output", "full/file/run").code == 7


def test_what_goes_wrong_in_training_is_shown_with_its_remedy(mptrain, recipe, monkeypatch):
    import mpcli.launch
    from mpcli.recipe.errors import Exit, user_error

    def train(*arguments, **options):
        raise user_error("disk full", "free some space", exit_code=Exit.STORAGE)

    monkeypatch.setattr(mpcli.launch, "train", train)
    outcome = mptrain("run", recipe.name, "--output", "out")
    assert outcome.code == 7
    assert outcome.err.endswith("error: disk full\n  help: free some space\n")
    assert "disk full" not in outcome.out


def test_what_goes_wrong_in_training_stands_at_its_place(mptrain, recipe, monkeypatch):
    import mpcli.launch
    from mpcli.recipe.errors import Exit, user_error

    def train(*arguments, **options):
        raise user_error("too much", path="train.global_batch_size", exit_code=Exit.ENVIRONMENT)

    monkeypatch.setattr(mpcli.launch, "train", train)
    outcome = mptrain("run", recipe.name, "--output", "out")
    assert outcome.code == 3
    assert "tiny.yaml:6:38: train.global_batch_size: too much\n" in outcome.err
    assert outcome.err.count("too much") == 1


def test_an_output_without_a_name_is_refused(mptrain, recipe):
    outcome = mptrain("run", recipe.name, "--output", "")
    assert outcome.code == 2
    assert outcome.err.startswith("error: `--output` names no folder\n")
