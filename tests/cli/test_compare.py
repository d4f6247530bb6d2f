"""`mptrain compare`: what it prints, and its JSON."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import snapshots
from tests.synthetic_runs import all_states, begin_recording, make_run

FP32 = [f"runs/small/20270115T01{seed}000Z-1a2b3c41" for seed in range(3)]
FP16 = [f"runs/small/20270115T02{seed}000Z-1a2b3c42" for seed in range(3)]
TRIALS = "runs/small/sweep-loss-scale-1a2b3c4d/trials"
ENDED_EARLY = [
    *("runs/diverged", "runs/out-of-memory", "runs/no-space", "runs/killed", "runs/preempted"),
    *("runs/interrupted", "runs/recorded", "runs/running", f"{TRIALS}/scale=65536-seed0"),
]


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory):
    """A folder with 20 runs in all states, of which some are diagnosed."""
    folder = tmp_path_factory.mktemp("twenty")
    with ExitStack() as stack:
        all_states(folder, stack)
        for name in (*FP16[:2], FP32[0]):
            findings = [{"id": "scale-too-high", "severity": "warning", "layers": ["conv"]}]
            diagnosis = {"findings": findings if name in FP16 else []}
            (folder / name / "diagnosis.json").write_text(json.dumps(diagnosis))
        yield folder


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    ("name", "paths"),
    [("groups", FP32 + FP16), ("seeds", FP32), ("states", [FP32[0], *ENDED_EARLY])],
)
def test_what_is_printed(there, monkeypatch, columns, name, paths):
    text = snapshots.on_a_terminal(monkeypatch, columns, "compare", *paths)
    snapshots.check(f"compare-{name}-{columns}.txt", text)


@pytest.mark.parametrize("columns", [80, 120])
def test_all_that_have_a_recipe(there, monkeypatch, columns):
    paths = sorted(str(path.parent) for path in Path("runs").rglob("attempts"))
    assert len(paths) == 20
    paths.remove("runs/lost-recipe")
    text = snapshots.on_a_terminal(monkeypatch, columns, "compare", *paths)
    snapshots.check(f"compare-all-{columns}.txt", text)


def test_json_says_all_of_it(there, mptrain):
    found = mptrain("compare", *FP32, *FP16, "--json").json
    assert (found["status"], found["exit_code"], found["same_recipe"]) == ("done", 0, False)
    assert [side["seeds"] for side in found["sides"]] == [[0, 1, 2], [0, 1, 2]]
    paths = {row["path"]: row["values"] for row in found["recipe"]}
    assert paths["precision.mode"] == {"A": ["fp32"], "B": ["fp16"]}
    assert found["metric"] == {"split": "eval", "name": "accuracy"}
    (verdict,) = found["verdicts"]
    assert verdict["difference"]["mean"] == pytest.approx(-0.012)
    assert verdict["difference"]["test"] == "paired"
    assert verdict["is_significant"] is True
    assert len(found["loss"]["tenths"]["B"]) == 10
    assert found["loss"]["apart"]["B"]["common"] == 100
    assert found["sides"][1]["runs"][0]["findings"][0]["id"] == "scale-too-high"
    assert found["sentences"][-1].endswith("more than seed noise")


def test_one_seed_cannot_tell(there, mptrain):
    outcome = mptrain("compare", FP32[0], FP16[0])
    assert outcome.out.splitlines()[-1] == (
        "eval accuracy, B - A: -1.10 points; cannot tell from one seed of A and of B whether that "
        "is more than seed noise"
    )


def test_two_names_of_a_run_are_one_run(there, mptrain):
    outcome = mptrain("compare", "runs/small/latest", FP16[2], FP32[0], "--json")
    assert [len(side["runs"]) for side in outcome.json["sides"]] == [1, 1]
    assert outcome.err == f"{FP16[2]} is runs/small/latest: it counts once\n"
    outcome = mptrain("compare", FP16[2], FP16[2])
    assert outcome.err.startswith(f"{FP16[2]} is named twice: it counts once\n")
    outcome = mptrain("compare", "runs/small/latest", FP16[2])
    assert outcome.code == 2
    assert "a comparison needs two runs" in outcome.err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/small", "not a run: no recipe.yaml"),
        ("runs/lost-recipe", "runs/lost-recipe: not a run: no recipe.yaml"),
        ("nowhere", "nowhere: no such folder"),
    ],
)
def test_what_is_no_run_is_told(there, mptrain, path, message):
    outcome = mptrain("compare", FP32[0], path)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_damaged_run_stands_beside_the_others(tmp_path, mptrain):
    runs = [make_run(tmp_path / name, done=5, metrics={"accuracy": 0.9}) for name in "abc"]
    (runs[1] / "result.json").unlink()
    (runs[1] / "result.json").mkdir()
    outcome = mptrain("compare", *runs, "--json")
    assert outcome.err == f"{runs[1]}: `result.json` is not a file\n"
    states = [run["state"] for side in outcome.json["sides"] for run in side["runs"]]
    assert states == ["done", "done", "unreadable"]
    assert "unreadable" in mptrain("compare", *runs).out


@pytest.mark.parametrize("damage", ["cut off", "not ours", "attempts", "recording's attempts"])
def test_a_run_that_nothing_can_be_read_of_ends_no_comparison(tmp_path, mptrain, damage):
    good = make_run(tmp_path / "good", done=5)
    if damage == "not ours":
        bad = make_run(tmp_path / "bad", done=5)
        (bad / "foreign.json").write_text("{}")
    elif damage == "attempts":
        bad = make_run(tmp_path / "bad", done=5)
    else:
        recording = begin_recording(tmp_path / "bad")
        recording.close()
        bad = recording.path
    if damage == "cut off":
        (bad / "foreign.json").write_text((bad / "foreign.json").read_text()[:20])
    if damage.endswith("attempts"):
        shutil.rmtree(bad / "attempts")
        (bad / "attempts").write_text("")
    outcome = mptrain("compare", good, bad)
    assert outcome.code == 0
    for facts in ("Recipe", "Environment", "Plan"):
        assert f"{facts}: not known of B\n" in outcome.out
    found = mptrain("compare", good, bad, "--json").json
    assert found["same_recipe"] is None
    assert found["unknown"] == {"recipe": ["B"], "environment": ["B"], "plan": ["B"]}
    other = make_run(tmp_path / "other", "optim.lr=0.3", done=5)
    out = mptrain("compare", good, bad, other).out
    assert "Environment: no difference; not known of B\n" in out


@pytest.mark.parametrize(
    "command",
    [("compare", "x" * 299), ("runs",), ("watch",), ("diagnose",), ("eval",), ("run", "--resume")],
)
def test_a_name_that_is_too_long_is_told(mptrain, command):
    outcome = mptrain(*command, "x" * 300)
    assert outcome.code == 2
    assert re.search("x[^ ]*: file name too long\n", outcome.err)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_diagnosis_that_cannot_be_read_is_told(tmp_path, mptrain, text):
    runs = [make_run(tmp_path / name, done=1) for name in "ab"]
    (runs[0] / "diagnosis.json").write_text(text)
    outcome = mptrain("compare", *runs)
    assert outcome.code == 0
    assert outcome.err == f"{runs[0] / 'diagnosis.json'}: no findings can be read from it\n"


def test_the_same_run_on_another_machine_differs_in_its_environment_alone(tmp_path, mptrain):
    make_run(tmp_path / "a", done=5)
    make_run(tmp_path / "b", done=5, environment={"python": "3.12.1"})
    out = mptrain("compare", tmp_path / "a", tmp_path / "b").out
    assert "Recipe: no difference" in out
    assert "B and A: the same loss in all of 5 steps" in out
    assert "all runs have the same recipe and seed: what differs is not of the recipe" in out


def test_a_strangers_words_are_escaped_and_short(tmp_path, mptrain):
    a, b = make_run(tmp_path / "a", done=1), make_run(tmp_path / "b", "optim.lr=0.3", done=1)
    findings = [{"id": "\x1b[2J" + "x" * 999, "severity": "error", "layers": ["l" * 999]}]
    (a / "diagnosis.json").write_text(json.dumps({"findings": findings}))
    out = mptrain("compare", a, b).out
    assert "\x1b" not in out
    assert "\\x1b[2J" in out
    assert "x" * 80 not in out
