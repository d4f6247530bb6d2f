"""`train.on_nonfinite: rollback`: back to the newest checkpoint, on with the next batch."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpcli import checkpoint
from mpcli.checkpoint import Checkpoint
from mpcli.recipe.errors import UserError
from mpcli.rundir import RunDirectory
from tests.small import resume_small, run_small, small_recipe
from tests.stopped import assert_same_run, kill_at, killed_run, signal_at

FP16 = "{mode: fp16, loss_scale: {kind: dynamic, init_scale: %d}}"


def rollback(**changes: object) -> list[str]:
    """Overrides; `__` stands for a dot."""
    values = {
        "train.steps": 8,
        "train.on_nonfinite": "rollback",
        "output.checkpoint_every": "3 steps",
        "output.keep_last": 20,
        "eval.every": "2 steps",
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{path}={value}" for path, value in values.items()]


def rows(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    path = run.path / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tensors(run: RunDirectory, step: int) -> dict[str, Tensor]:
    return checkpoint.load(Checkpoint(run.checkpoints_path / f"step-{step}", step))[0]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_state_becomes_that_of_the_checkpoint_and_the_next_batch_follows(
    tmp_path: Path, bad: dict[int, float]
) -> None:
    bad[5] = float("nan")
    run, result = run_small(tmp_path, *rollback(output__checkpoint_every="1 steps"))
    assert (result.status, result.steps_attempted) == ("done", 8)
    # Checkpoints of each step up to 4; nothing but the bad step itself is taken back then.
    assert_equal(tensors(run, 5), tensors(run, 4))

    bad[6] = float("inf")
    run, result = run_small(tmp_path, *rollback(), name="other")
    steps = rows(run, "steps.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in steps if not row["applied"]] == [5, 6]
    taken = [(r["step"], r["checkpoint"], r["attempt"]) for r in rows(run, "rollbacks.jsonl")]
    assert taken == [(5, 3, 1), (6, 3, 1)]  # step 4 was taken back with the first
    assert_equal(tensors(run, 6), tensors(run, 3))
    assert (result.steps_applied, result.steps_skipped) == (5, 3)
    assert [p["message"] for p in result.problems] == [
        f"step {step}: NaN or infinite gradients: the loss itself is nan, so the trouble begins in "
        "forward; the run goes on from the checkpoint of step 3, without the batches since then"
        for step in (5, 6)
    ]
    assert [row["step"] for row in rows(run, "evals.jsonl")] == [2, 4, 6, 8]


def test_rates_follow_the_steps_that_count(tmp_path: Path, bad: dict[int, float]) -> None:
    bad[5] = float("nan")
    run, _ = run_small(tmp_path, *rollback(optim__schedule="{kind: linear}"))
    rates = [row["lr"] for row in rows(run, "steps.jsonl")]
    expected = [0.1 * (1 - applied / 8) for applied in (0, 1, 2, 3, 4, 3, 4, 5)]
    assert rates == pytest.approx(expected)


def test_a_bad_step_is_found_late_and_taken_back_as_if_at_once(
    tmp_path: Path, bad: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come in blocks of 8 steps: with a block for each step all must be the same."""
    late = rollback(train__steps=30, output__checkpoint_every="12 steps", eval__every="null")
    bad[2] = bad[15] = float("nan")
    run, result = run_small(tmp_path, *late)
    monkeypatch.setattr("mpcli.outcomes.BLOCK", 1)
    other, _ = run_small(tmp_path, *late, name="other")
    assert [row["step"] for row in rows(run, "steps.jsonl")] == list(range(1, 31))
    assert result.steps_applied == 25  # less 1 and 2, 13 to 15
    assert rows(run, "rollbacks.jsonl") == rows(other, "rollbacks.jsonl")
    assert len(rows(run, "rollbacks.jsonl")) == 2
    assert_equal(tensors(run, 30), tensors(other, 30))


def test_the_last_step_taken_back_is_evaluated_and_saved(
    tmp_path: Path, bad: dict[int, float]
) -> None:
    bad[8] = float("nan")
    run, result = run_small(tmp_path, *rollback())
    assert (result.status, result.steps_applied) == ("done", 6)
    assert_equal(tensors(run, 8), tensors(run, 6))
    assert rows(run, "evals.jsonl")[-1]["step"] == 8


def test_without_a_checkpoint_it_goes_back_to_the_beginning(
    tmp_path: Path, bad: dict[int, float]
) -> None:
    bad[2] = float("nan")
    run, result = run_small(tmp_path, *rollback())
    assert rows(run, "rollbacks.jsonl")[0]["checkpoint"] == 0
    assert result.steps_applied == 6
    assert set(tensors(run, 0)) == set(tensors(run, 3))


def test_rollbacks_are_bounded(tmp_path: Path, bad: dict[int, float]) -> None:
    bad.update(dict.fromkeys(range(4, 9), float("nan")))
    run, result = run_small(tmp_path, *rollback(train__max_rollbacks=2))
    assert (result.status, result.exit_code) == ("diverged", 5)
    assert result.reason is not None
    assert "step 6: NaN or infinite gradients again after 2 rollbacks" in result.reason
    assert len(rows(run, "rollbacks.jsonl")) == 2


def test_what_a_lower_scale_mends_is_only_skipped(tmp_path: Path, bad: dict[int, float]) -> None:
    run, result = run_small(tmp_path, *rollback(precision=FP16 % 2**24))
    assert 0 < result.steps_skipped < 8
    assert not rows(run, "rollbacks.jsonl")
    bad[6] = float("inf")  # no scale mends a loss of NaN
    run, result = run_small(tmp_path, *rollback(precision=FP16 % 1024), name="other")
    assert [row["step"] for row in rows(run, "rollbacks.jsonl")] == [6]
    assert result.steps_applied == 5


def when_written(
    monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[RunDirectory], object]
) -> None:
    """Do something as soon as a step's row is in its file."""
    append = RunDirectory.append_steps

    def append_steps(self: RunDirectory, rows: list[Any]) -> None:
        append(self, rows)
        if rows[-1].step == step:
            act(self)

    monkeypatch.setattr(RunDirectory, "append_steps", append_steps)


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, bad: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad[8] = float("nan")
    when_written(
        monkeypatch, 8, lambda run: (run.checkpoints_path / "step-6/state.json").write_text("{}")
    )
    run, result = run_small(tmp_path, *rollback())
    assert rows(run, "rollbacks.jsonl")[0]["checkpoint"] == 3
    assert result.status == "done"
    assert "step-6 cannot be used" in result.problems[0]["message"]


def test_no_checkpoint_left_ends_the_run_with_4(
    tmp_path: Path, bad: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad[8] = float("nan")
    when_written(
        monkeypatch,
        8,
        lambda run: [(path / "manifest.json").unlink() for path in run.checkpoints_path.iterdir()],
    )
    _, result = run_small(tmp_path, *rollback())
    assert (result.status, result.exit_code) == ("failed", 4)


def test_a_resumed_run_counts_its_rollbacks(tmp_path: Path, bad: dict[int, float]) -> None:
    bad[4] = float("nan")
    run, _ = run_small(tmp_path, *rollback(train__max_rollbacks=1))
    bad[10] = float("nan")
    result = resume_small(run, "train.steps=12")
    assert (result.status, result.exit_code) == ("diverged", 5)
    assert [row["step"] for row in rows(run, "rollbacks.jsonl")] == [4]


def test_without_checkpoints_the_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        small_recipe(tmp_path, *rollback(output__checkpoint_every="null"))
    (problem,) = caught.value.problems
    assert "`rollback` goes back to a checkpoint, and none are made" in problem.what
    assert problem.path == "train.on_nonfinite"


@pytest.mark.parametrize(
    "precision", ["{mode: fp32}", pytest.param(FP16 % 2**17, marks=pytest.mark.slow)]
)
def test_killed_at_any_step_it_goes_back_to_the_same(
    tmp_path: Path, bad: dict[int, float], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    bad.update({5: float("nan"), 7: float("inf")})
    overrides = rollback(precision=precision, train__max_rollbacks=9, train__ema=0.9)
    whole, result = run_small(tmp_path, *overrides, name="whole")
    assert result.status == "done"
    taken = [{**row, "attempt": 1} for row in rows(whole, "rollbacks.jsonl")]
    assert [row["step"] for row in taken] == [5, 7]
    for call in range(1, 9):
        with monkeypatch.context() as patch:
            kill_at(patch, call)
            run = killed_run(tmp_path, *overrides, name=f"{call}")
        assert resume_small(run).status == "done"
        assert_same_run(run, whole)
        assert [{**row, "attempt": 1} for row in rows(run, "rollbacks.jsonl")] == taken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_checkpoints_that_signals_asked_for_are_no_place_to_go_back_to(
    tmp_path: Path, bad: dict[int, float], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Without the signal they would not be there, and the run would go back further."""
    bad[6] = float("nan")
    overrides = rollback(output__keep_last=1)
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    for step in (1, 3, 4, 5):
        with monkeypatch.context() as patch:
            signal_at(patch, number, step)
            run, result = run_small(tmp_path, *overrides, name=f"{number}-{step}")
        if number == signal.SIGTERM:
            assert result.exit_code == 75
            result = resume_small(run)
        assert result.status == "done"
        assert [row["checkpoint"] for row in rows(run, "rollbacks.jsonl")] == [3]
        assert_same_run(run, whole)


def test_skips_in_a_row_are_counted_anew(tmp_path: Path, bad: dict[int, float]) -> None:
    high = FP16 % 2**24
    _, result = run_small(tmp_path, *rollback(precision=high))
    skips = result.steps_skipped
    assert 0 < skips < 7
    bad[1] = float("nan")  # then as many steps are skipped as without it
    limit = rollback(precision=high, train__max_consecutive_skips=skips + 1)
    _, result = run_small(tmp_path, *limit, name="other")
    assert (result.status, result.steps_skipped) == ("done", skips + 1)
