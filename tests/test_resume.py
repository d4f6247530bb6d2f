"""A run that was stopped ends as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
from torch import nn

from mpcli.data.images import ImageInfo
from mpcli.recipe.errors import Exit
from mpcli.recipe.load import load_recipe
from mpcli.rundir import RunDirectory
from mpcli.tasks import image_classification as task
from tests.small import resume_small, run_small
from tests.stopped import (
    EVERY_OTHER,
    LENGTH,
    MODES,
    assert_same_run,
    die,
    kill_at,
    killed_run,
    rows,
    signal_at,
)

QUICK = ("fp32", "fp16", "adamw", "ema")


@pytest.mark.parametrize(
    "mode", [m if m in QUICK else pytest.param(m, marks=pytest.mark.verify) for m in MODES]
)
def test_killed_at_any_step_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    overrides = [*LENGTH, EVERY_OTHER, *MODES[mode]]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    for step in range(1, 8):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            run = killed_run(tmp_path, *overrides, name=f"{step}")
        result = resume_small(run)
        assert (result.status, result.steps_attempted) == ("done", 7)
        assert_same_run(run, whole)


def test_who_makes_the_batches_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run_small(tmp_path, *LENGTH, "data.augment=[flip, crop, cutout]", name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        run = killed_run(tmp_path, *LENGTH, *MODES["workers"], EVERY_OTHER)
    assert resume_small(run, "engine.data_workers=0").status == "done"
    assert_same_run(run, whole)


def test_three_resumes_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "train={epochs: 2, global_batch_size: 150, micro_batch_size: 64, ema: 0.9}",
        "precision.mode=fp16",
        "optim.schedule={kind: one-cycle}",
        "eval.every=1 epoch",
        "output.checkpoint_every=1 epoch",
    ]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 2, 5, 7)
        run, result = run_small(tmp_path, *overrides)
        for attempt in (2, 3):
            assert result.exit_code == Exit.PREEMPTED
            result = resume_small(run)
            assert (run.path / "attempts" / str(attempt) / "observed.json").exists()
    assert result.steps_attempted == 7
    assert resume_small(run).status == "done"
    assert_same_run(run, whole)
    lines = (run.path / "steps.jsonl").read_text().splitlines()
    attempts = [json.loads(line)["attempt"] for line in lines]
    assert attempts == [1] * 2 + [2] * 3 + [3] * 2 + [4] * 11


def test_random_numbers_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_model(options: object, info: ImageInfo) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(), nn.Linear(16, 10))

    monkeypatch.setattr(task, "build_model", build_model)
    whole, _ = run_small(tmp_path, EVERY_OTHER, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        run = killed_run(tmp_path, EVERY_OTHER)
    resume_small(run)
    assert_same_run(run, whole)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run_small(tmp_path, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        run = killed_run(tmp_path)
    assert len(rows(run)) == 2
    result = resume_small(run)
    assert_same_run(run, whole)
    assert result.steps_attempted == 4


def test_skips_in_a_row_are_counted_across_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "precision={mode: fp16, loss_scale: {kind: static, scale: 1e30}}",
        "train={steps: 20, global_batch_size: 16, max_consecutive_skips: 5}",
    ]
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 3)
        run, _ = run_small(tmp_path, *overrides)
    result = resume_small(run)
    assert (result.status, result.exit_code) == ("diverged", 5)
    assert "step 5: 5 steps in a row" in (result.reason or "")
    assert result.steps_applied == 0


@pytest.mark.parametrize(
    ("metric", "values", "best", "kept"),
    [
        ("loss", [4, 2, 3, 5, 6], 2, {2, 4, 5}),
        ("loss", [4, 3, 2, 1, 0], 5, {4, 5}),
        ("loss", [4, 3, 3, 5, 6], 2, {2, 4, 5}),
        ("loss", [math.nan, -math.inf, 3, 5, 6], 3, {3, 4, 5}),
        ("accuracy", [0.1, 0.5, 0.3, 0.4, 0.5], 2, {2, 4, 5}),  # the first of equals
    ],
)
def test_the_best_checkpoint_is_kept_besides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    values: list[float],
    best: int,
    kept: set[int],
) -> None:
    found = iter(values)
    monkeypatch.setattr(
        task, "evaluate", lambda *_: {"loss": 9.0, "accuracy": 0.0} | {metric: next(found)}
    )
    overrides = [
        *("train.steps=5", "eval.every=1 steps"),
        f"output={{checkpoint_every: 1 steps, keep_last: 2, keep_best: {metric}}}",
    ]
    run, result = run_small(tmp_path, *overrides)
    assert {path.name for path in run.checkpoints_path.iterdir()} == {f"step-{n}" for n in kept}
    assert result.best_checkpoint == f"checkpoints/step-{best}"


def test_the_best_is_saved_when_it_is_found_and_survives_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(task, "evaluate", lambda *_: {"loss": next(found), "accuracy": 0.0})
    overrides = [
        *("train.steps=6", "eval.every=1 steps"),
        "output={checkpoint_every: 3 steps, keep_last: 1, keep_best: loss}",
    ]
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        run = killed_run(tmp_path, *overrides)
    assert {path.name for path in run.checkpoints_path.iterdir()} == {"step-2", "step-3"}
    found = iter([2.0, 2.0, 2.0])
    result = resume_small(run)
    assert {path.name for path in run.checkpoints_path.iterdir()} == {"step-2", "step-6"}
    assert result.best_checkpoint == "checkpoints/step-2"


def test_rows_past_the_checkpoint_and_a_torn_line_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["train.steps=6", "eval.every=1 steps", "output.checkpoint_every=3 steps"]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        run = killed_run(tmp_path, *overrides)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]
    for name in ("steps.jsonl", "evals.jsonl"):
        with (run.path / name).open("a") as file:
            file.write('{"step": 6, "att')
    resume_small(run)
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 2', b"\0" * 5000, b"[" * 70000 + b"\n", b'{"step": 1}\n', b'{"step": "2"}\n'],
)
def test_what_is_no_row_is_cut_with_all_that_follows(tmp_path: Path, tail: bytes) -> None:
    run = RunDirectory(tmp_path)
    whole = b'{"step": 1, "loss": 3.5}\n'
    (tmp_path / "steps.jsonl").write_bytes(whole + tail + whole)
    assert run.cut(5, 5) == 1
    assert (tmp_path / "steps.jsonl").read_bytes() == whole
    assert not (tmp_path / "evals.jsonl").exists()


def test_lost_rows_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 3)
    run, _ = run_small(tmp_path)
    path = run.path / "steps.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    result = resume_small(run)
    assert [row["step"] for row in rows(run)] == [1, 4]
    assert [p["message"] for p in result.problems] == [
        "steps.jsonl has no rows of the steps 2 to 3"
    ]


def test_more_steps_recompute_the_schedule_and_say_so(tmp_path: Path) -> None:
    schedule = "optim.schedule={kind: linear}"
    run, _ = run_small(tmp_path, schedule)
    result = resume_small(run, "train.steps=8")
    assert (result.status, result.steps_attempted) == ("done", 8)
    assert [row["lr"] for row in rows(run)] == pytest.approx(
        [0.1, 0.075, 0.05, 0.025, 0.05, 0.0375, 0.025, 0.0125]
    )
    (problem,) = result.problems
    assert "8 steps instead of 4" in problem["message"]
    assert (problem["severity"], problem["path"]) == ("warning", "train.steps")
    assert result.checkpoint == "final"
    about = json.loads((run.path / "attempts/2/resumed.json").read_text())
    assert about == {"changes": ["train.steps: `4` -> `8`"]}
    # the next resume knows the new length, and the run's own recipe is as it was
    assert load_recipe(RunDirectory(run.path, attempt=2).recipe_path).recipe.train.steps == 8
    assert load_recipe(run.path / "recipe.yaml").recipe.train.steps == 4


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_already_has_its_steps_is_brought_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 3)
        run, _ = run_small(tmp_path)
    result = resume_small(run, f"train.steps={steps}")
    assert (result.status, result.steps_attempted) == ("done", 3)
    assert [row["step"] for row in rows(run, "evals.jsonl")] == [3]
    assert run.final_path.exists()


def test_killed_between_the_last_step_and_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = run_small(tmp_path, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_result", lambda *arguments: die())
        run = killed_run(tmp_path)
    assert run.final_path.exists()
    assert run.result() is None
    assert resume_small(run).metrics == expected.metrics
    assert_same_run(run, whole)
    assert len(rows(run, "evals.jsonl")) == 1


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    run_small(tmp_path, "eval.every=2 steps", EVERY_OTHER)
    for name in ("recipe.yaml", "plan.json", "recipe.source.yaml", "1", "attempts"):
        assert name in synced[: synced.index("steps.jsonl")]  # before step 1
    first = synced.index("state.json")
    assert {"steps.jsonl", "evals.jsonl"} <= set(synced[:first])
    last = len(synced) - synced[::-1].index("model.safetensors") - 1
    assert synced[last + 1 :][-4:] == ["final.tmp", "run", "result.json.tmp", "run"]


def test_steps_at_the_floor_are_counted_across_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = "init_scale: 1e30, min_scale: 1e30, max_scale: 1e30"
    floor = f"precision={{mode: fp16, loss_scale: {{kind: dynamic, {scales}}}}}"
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 1)
        run, _ = run_small(tmp_path, floor)
    result = resume_small(run)
    assert result.status == "diverged"
    assert "step 2: the loss scale is at its floor" in (result.reason or "")


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4])
def test_a_compiled_model_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Step 1 is computed before the model is compiled: also after a resume from step 0."""
    overrides = ["engine.compile=true", "train.on_nonfinite=rollback", EVERY_OTHER]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, at)
        run = killed_run(tmp_path, *overrides)
    resume_small(run)
    assert_same_run(run, whole)
    assert (run.path / "attempts/2/observed.json").exists() == (at == 2)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "train.steps=7", EVERY_OTHER, "output.keep_last=2")
    assert {path.name for path in run.checkpoints_path.iterdir()} == {"step-6", "step-7"}
    run, _ = run_small(tmp_path, "output.checkpoint_every=null", name="none")
    assert not any(run.checkpoints_path.iterdir())


def test_a_diverged_state_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static = "precision={mode: fp16, loss_scale: {kind: static, scale: 1e30}}"
    skips = "train={steps: 20, global_batch_size: 16, max_consecutive_skips: 2}"
    signal_at(monkeypatch, signal.SIGTERM, 2)
    run, result = run_small(tmp_path, static, skips)
    assert (result.status, result.checkpoint) == ("diverged", None)
    assert not any(run.checkpoints_path.iterdir())
