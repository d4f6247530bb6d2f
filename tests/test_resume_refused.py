"""What a resume refuses, or passes over: other recipes and checkpoints, odd run directories."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpcli import checkpoint
from mpcli.checkpoint import Checkpoint
from mpcli.plan import make_plan
from mpcli.recipe.changes import allowed_changes, refuse_kinds
from mpcli.recipe.errors import Exit, UserError
from mpcli.rundir import RunDirectory
from tests.small import CPU, resume_small, run_small, small_recipe
from tests.stopped import (
    EVERY_OTHER,
    assert_same_run,
    kill_at,
    killed_run,
    rows,
    signal_at,
)


@pytest.mark.parametrize(
    "override",
    ["train.epochs=2", "train.steps=9", "train.micro_batch_size=4", "eval.every=2 steps",
     "output.checkpoint_every=10 minutes", "engine.activation_checkpointing=true"],
)  # fmt: skip
def test_what_a_resume_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2)
    run, _ = run_small(tmp_path)
    assert resume_small(run, override).status == "done"


@pytest.mark.parametrize(
    ("override", "path", "what"),
    [
        ("optim.lr=0.2", "optim.lr", "the run has `0.1`, found `0.2`"),
        ("precision.mode=bf16", "precision.mode", "the run has `fp32`, found `bf16`"),
        ("train.seed=1", "train.seed", "the run has `0`, found `1`"),
        ("output.keep_last=3", "output.keep_last", "the run has `2`, found `3`"),
        (
            "train.clip={kind: norm, max_norm: 1}",
            "train.clip",
            "the run has `null`, found a section",
        ),
    ],
)
def test_what_makes_it_another_run_is_refused_with_the_difference(
    tmp_path: Path, override: str, path: str, what: str
) -> None:
    before = small_recipe(tmp_path).recipe
    with pytest.raises(UserError) as caught:
        allowed_changes(before, small_recipe(tmp_path, override, "train.steps=9"))
    (problem,) = caught.value.problems
    assert caught.value.exit_code == Exit.USAGE
    assert (problem.path, problem.what) == (path, what)
    assert problem.place is not None


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("optim.kind=adamw", "the run has `sgd`, found `adamw`"),
        ("task.model.kind=vit", "the run has `smallnet`, found `vit`"),
    ],
)
def test_another_kind_is_refused_before_its_fields_are_missed(
    tmp_path: Path, override: str, what: str
) -> None:
    with pytest.raises(UserError) as caught:
        refuse_kinds(small_recipe(tmp_path).recipe, ["engine.kind=ddp", "optim.kind=sgd", override])
    (problem,) = caught.value.problems
    assert (problem.path, problem.what) == (override.partition("=")[0], what)


def test_a_checkpoint_that_is_damaged_is_passed_over_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["train.steps=7", EVERY_OTHER]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        run = killed_run(tmp_path, *overrides)
    (run.checkpoints_path / "step-4" / "state.json").write_text("{}")
    result = resume_small(run)
    assert "step-4" in result.problems[0]["message"]
    assert result.problems[0]["severity"] == "warning"
    assert_same_run(run, whole)


def test_one_flipped_bit_of_a_weight_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        run = killed_run(tmp_path, "train.steps=7", EVERY_OTHER)
    (tensors,) = (run.checkpoints_path / "step-4").glob("*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    result = resume_small(run)
    assert "SHA-256" in result.problems[0]["message"]
    assert result.status == "done"


def test_without_a_valid_checkpoint_it_exits_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2)
    run, _ = run_small(tmp_path)
    (run.checkpoints_path / "step-2" / "state.json").unlink()
    steps = (run.path / "steps.jsonl").read_bytes()
    result = resume_small(run)
    assert (result.status, result.exit_code) == ("failed", 4)
    assert (run.path / "steps.jsonl").read_bytes() == steps


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (["task.model={kind: smallnet, width: 6}"], "here"),
        (["optim={kind: adam, lr: 0.1}"], "is unknown"),
        (["train.ema=0.5"], "is unknown"),
        (["precision.mode=bf16-pure"], "bfloat16"),
    ],
)
def test_a_checkpoint_of_another_run_exits_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[str], what: str
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2, 4)
    run, _ = run_small(tmp_path)
    foreign, _ = run_small(tmp_path, *other, name="foreign")
    (run.checkpoints_path / "step-2").rename(tmp_path / "away")
    (foreign.checkpoints_path / "step-2").rename(run.checkpoints_path / "step-2")
    result = resume_small(run)
    assert (result.status, result.exit_code) == ("failed", 4)
    assert "it is not of this run" in (result.reason or "")
    assert what in (result.reason or "")


@pytest.mark.parametrize("wrong", ["foreign", "state", "random"])
def test_what_does_not_fit_is_passed_over_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """It verifies, but is of another run, of another version, or holds no random state."""
    whole, _ = run_small(tmp_path, EVERY_OTHER, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        run = killed_run(tmp_path, EVERY_OTHER)
    other, _ = run_small(tmp_path, "task.model.width=6", name="other")
    path = run.checkpoints_path / "step-4"
    if wrong == "foreign":
        (other.checkpoints_path / "step-4").rename(path)
    else:
        tensors, state = checkpoint.load(Checkpoint(run.checkpoints_path / "step-2", 2))
        state["attempted"] = state["engine"]["attempted"] = 4
        if wrong == "state":
            state["of_a_later_version"] = 1
        else:
            tensors["rng.cpu"] = tensors["rng.cpu"][:7]
        checkpoint.save(run.checkpoints_path, 4, tensors, state, keep_last=2)
    result = resume_small(run)
    (problem,) = result.problems
    assert problem["message"].startswith("checkpoint step-4 cannot be used: it ")
    assert "\n" not in problem["message"]
    assert_same_run(run, whole)


def test_without_its_attempts_a_run_still_goes_on(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path)
    shutil.rmtree(run.path / "attempts")
    assert resume_small(run, "train.steps=6").status == "done"
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["0", "999999999", "1.tmp", "x"])
def test_any_attempt_but_the_first_goes_on(tmp_path: Path, name: str) -> None:
    run, _ = run_small(tmp_path)
    (run.path / "attempts/1").rename(run.path / "attempts" / name)
    for steps in (6, 8):
        assert resume_small(run, f"train.steps={steps}").status == "done"
    assert [row["step"] for row in rows(run)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "folder") for name in ("attempts", "checkpoints", "final", "final.tmp")]
    + [(name, "file") for name in ("steps.jsonl", "rollbacks.jsonl", "result.json.tmp", "lock")],
)
def test_what_is_of_another_kind_is_refused_before_anything_is_cut(
    tmp_path: Path, name: str, kind: str
) -> None:
    run, _ = run_small(tmp_path)
    path = run.path / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.write_text("x")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=f"`{name}` is not a {kind}") as caught:
        RunDirectory.open(run.path)
    assert caught.value.exit_code == Exit.USAGE


def test_a_huge_result_is_none(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path)
    assert run.result() is not None
    with (run.path / "result.json").open("ab") as file:
        file.truncate(2**40)
    assert run.result() is None


@pytest.mark.parametrize(
    "wrong", [{"attempted": 1}, {"applied": 3}, {"evaluated": 2}, {"steps": "x"}, {"more": 1}]
)
def test_a_state_that_cannot_be_exits_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2)
    run, _ = run_small(tmp_path)
    tensors, state = checkpoint.load(Checkpoint(run.checkpoints_path / "step-2", 2))
    checkpoint.save(run.checkpoints_path, 2, tensors, state | wrong, keep_last=1)
    result = resume_small(run)
    assert (result.status, result.exit_code) == ("failed", 4)


def test_a_run_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path)
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, tmp_path / "run")
    with pytest.raises(UserError, match="writes to this run") as caught:
        RunDirectory.open(run.path)
    assert caught.value.exit_code == Exit.USAGE
    run.close()
    RunDirectory.open(run.path).close()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("steps.jsonl", lambda path: path.symlink_to("/etc/hostname")),
        ("lock", lambda path: path.symlink_to("/dev/null")),
        ("attempts/2", lambda path: path.symlink_to("/tmp")),
        ("evals.jsonl", lambda path: path.unlink(missing_ok=True) or __import__("os").mkfifo(path)),
    ],
)
def test_a_run_directory_with_links_or_devices_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    run, _ = run_small(tmp_path)
    path = run.path / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(UserError, match="neither a file nor a folder") as caught:
        RunDirectory.open(run.path)
    assert caught.value.exit_code == Exit.USAGE


def test_what_is_not_a_run_is_refused_saying_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, found in (
        ("missing", "no such folder"),
        ("file", "is a file"),
        ("folder", "not a run: no recipe.yaml, but nothing"),
        ("", "not a run: no recipe.yaml, but file, folder"),
    ):
        with pytest.raises(UserError, match=found) as caught:
            RunDirectory.open(tmp_path / name)
        assert caught.value.exit_code == Exit.USAGE
