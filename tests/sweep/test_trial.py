"""A trial is an ordinary run, whatever became of the process that ran it before."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from optuna.trial import TrialState

from mpcli import signals
from mpcli.progress import Diverged
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.records import StepRecord
from mpcli.rundir import RunDirectory
from mpcli.sweep import trial as trials
from mpcli.sweep.cells import Cell
from mpcli.sweep.folder import SweepFolder
from mpcli.sweep.results import TrialResult
from mpcli.sweep.study import Claim, Study
from tests.small import run_small, small_recipe

CELL = Cell("lr=0.1", ("optim.lr=0.1",), seed=3)


class Sweep:
    """Of one cell."""

    def __init__(self, path: Path, *overrides: str, cell: Cell = CELL) -> None:
        self.cell = cell
        self.folder = SweepFolder(path / "sweep")
        self.folder.prepare(small_recipe(path, *overrides), "grid", {})
        self.study = Study(self.folder, "study")
        self.run_path = self.folder.run_path(cell)

    def claim(self) -> Claim:
        """As a new process takes it."""
        self.study.revive([self.cell])
        claim = self.study.claim([self.cell])
        assert claim is not None
        return claim

    def run(self) -> None:
        """One trial."""
        trials.run_trial(self.claim(), self.folder, "grid")

    def result(self) -> TrialResult:
        """Of the cell."""
        return self.study.result(self.cell, self.study.look([self.cell])[self.cell.name])

    def attempts(self) -> int:
        """At its run."""
        return len(list(self.run_path.glob("attempts/*")))


def test_a_trial_is_the_run_of_its_recipe(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "train.steps=60", "optim.lr=0.5")
    sweep.run()
    run, alone = run_small(tmp_path, "train.steps=60", "optim.lr=0.1", "train.seed=3")
    result = sweep.result()
    losses = [row.loss for row in run.steps()]
    assert (result.status, result.steps, result.skipped) == ("done", 60, 0)
    assert (result.label, result.seed, result.run) == ("lr=0.1", 3, "lr=0.1-seed3")
    assert (result.first_loss, result.loss) == (losses[0], sum(losses[-6:]) / 6)
    assert result.metrics == alone.metrics["eval"]
    assert result.seconds_per_step is not None
    assert result.seconds_per_step > 0
    assert sweep.study.optuna.trials[0].value == result.loss
    assert sweep.study.optuna.trials[0].state == TrialState.COMPLETE


def test_a_run_that_has_ended_is_only_read(tmp_path: Path) -> None:
    """Its process died before it told the study; or the study was lost."""
    sweep = Sweep(tmp_path)
    claim = sweep.claim()
    with mock.patch.object(Claim, "end", lambda claim, result: claim.release()):
        trials.run_trial(claim, sweep.folder, "grid")
    rows = (sweep.run_path / "steps.jsonl").stat()
    sweep.run()
    assert sweep.result().status == "done"
    assert sweep.attempts() == 1
    assert (sweep.run_path / "steps.jsonl").stat() == rows


def killed_while_it_made_the_folder(path: Path) -> None:
    shutil.rmtree(path / "attempts")
    (path / "steps.jsonl").unlink()


def killed_while_it_wrote_the_plan(path: Path) -> None:
    plan = path / "attempts" / "1" / "plan.json"
    plan.write_text(plan.read_text()[:100])


def killed_in_training(path: Path) -> None:
    rows = (path / "steps.jsonl").read_text().splitlines()
    (path / "steps.jsonl").write_text("\n".join([*rows[:2], rows[2][:20]]))


@pytest.mark.parametrize(
    ("death", "attempts"),
    [
        (killed_while_it_made_the_folder, 1),
        (killed_while_it_wrote_the_plan, 1),
        (killed_in_training, 2),
    ],
)
def test_a_run_whose_process_was_killed_is_gone_on_with(
    tmp_path: Path, death: Callable[[Path], None], attempts: int
) -> None:
    sweep = Sweep(tmp_path)
    claim = sweep.claim()
    with mock.patch.object(Claim, "end", lambda claim, result: claim.release()):
        trials.run_trial(claim, sweep.folder, "grid")
    whole = sweep.run_path / "final" / "model.safetensors"
    before = whole.read_bytes()
    (sweep.run_path / "result.json").unlink()
    shutil.rmtree(sweep.run_path / "final")
    death(sweep.run_path)
    sweep.run()
    assert sweep.result().status == "done"
    assert sweep.result().steps == 4
    assert whole.read_bytes() == before
    assert sweep.attempts() == attempts


def test_a_stopped_run_goes_back_and_on_from_its_checkpoint(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "train.steps=20")

    def stopped_in_step_7(run: RunDirectory, step: int) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(RunDirectory, "at_step", stopped_in_step_7), signals.handled():
        sweep.run()
    assert not sweep.study.look([CELL])[CELL.name].over
    assert [path.name for path in sweep.run_path.glob("checkpoints/*")] == ["step-7"]
    sweep.run()
    result = sweep.result()
    assert (result.status, result.steps) == ("done", 20)
    alone = launch_alone(tmp_path)
    assert (sweep.run_path / "final/model.safetensors").read_bytes() == alone
    assert result.first_loss == next(RunDirectory.read(sweep.run_path).steps()).loss


def launch_alone(folder: Path) -> bytes:
    run, _ = run_small(folder, "train.steps=20", "train.seed=3")
    return (run.final_path / "model.safetensors").read_bytes()


def test_a_diverging_run_is_ended_early(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "train.steps=200", cell=Cell("lr", ("optim.lr=30",), 0))
    sweep.run()
    result = sweep.result()
    assert result.status == "diverged"
    assert "more than 3 times" in (result.reason or "")
    assert result.steps < 50
    assert json.loads((sweep.run_path / "result.json").read_text())["exit_code"] == Exit.NUMERICS
    assert sweep.study.optuna.trials[0].state == TrialState.PRUNED


@pytest.mark.parametrize("first", [-1.0, 0.0])
def test_a_loss_that_may_be_negative_is_not_judged(first: float) -> None:
    run = mock.Mock(steps=lambda: iter(()))
    watch = trials._Watch(run, mock.Mock(is_worse=mock.Mock(side_effect=AssertionError)))
    watch.start(mock.Mock(), mock.Mock())
    watch.steps([row(step, first * step) for step in range(1, 21)])


def test_the_mean_of_ten_steps_is_judged() -> None:
    claim = mock.Mock(is_worse=mock.Mock(return_value=False))
    watch = trials._Watch(mock.Mock(steps=lambda: iter(())), claim)
    watch.start(mock.Mock(), mock.Mock())
    for step in range(1, 26):
        watch.steps([row(step, 2.0 * step)])
    assert claim.is_worse.mock_calls == [mock.call(10, 5.5), mock.call(20, 15.5)]
    watch.steps([row(step, math.nan) for step in range(26, 31)])  # skipped steps, say
    assert claim.is_worse.call_args == mock.call(30, 23.0)
    watch.steps([row(step, math.nan) for step in range(31, 41)])
    assert math.isnan(claim.is_worse.call_args.args[1])


def test_a_loss_that_is_finite_later_is_the_first(tmp_path: Path) -> None:
    claim = mock.Mock(is_worse=mock.Mock(return_value=False))
    watch = trials._Watch(mock.Mock(steps=lambda: iter((row(1, math.nan),))), claim)
    watch.start(mock.Mock(), mock.Mock())
    watch.steps([row(2, math.inf), *(row(step, 4.0) for step in range(3, 11))])
    assert claim.is_worse.mock_calls == [mock.call(10, 1.0)]


def test_a_loss_that_is_not_a_number_is_called_that() -> None:
    claim = mock.Mock(is_worse=mock.Mock(return_value=True))
    watch = trials._Watch(mock.Mock(steps=lambda: iter(())), claim)
    with pytest.raises(Diverged, match=r"^step 10: no loss of 10 steps is finite$"):
        watch.steps([row(step, math.nan) for step in range(1, 11)])


def row(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step, attempt=1, loss=loss, lr=0.1, grad_norm=1.0, scale=1.0, applied=True,
        samples_per_second=1.0, memory_allocated_bytes=0, memory_peak_bytes=0,
    )  # fmt: skip


def test_a_recipe_that_cannot_be_run_fails_its_cell_alone(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, cell=Cell("batch", ("train.global_batch_size=100000",), 0))
    sweep.run()
    result = sweep.result()
    assert result.status == "failed"
    assert "train.global_batch_size" in (result.reason or "")
    assert not sweep.run_path.exists()


def test_a_run_that_another_process_has_stays_to_be_gone_on_with(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    run, _ = run_small(tmp_path, name="other")
    sweep.run_path.parent.mkdir(parents=True, exist_ok=True)
    run.path.rename(sweep.run_path)
    (sweep.run_path / "result.json").unlink()
    held = RunDirectory.open(sweep.run_path)
    with pytest.raises(UserError, match="another process"):
        sweep.run()
    held.close()
    sweep.run()
    assert sweep.result().status == "done"


def test_a_bug_fails_its_cell_alone(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    with mock.patch("mpcli.trainer.learning_rate", side_effect=RuntimeError("a bug")):
        sweep.run()
    assert sweep.result().reason == "RuntimeError: a bug"
    assert "Traceback" in (sweep.run_path / "attempts/1/log.rank0.txt").read_text()


def test_a_full_disk_ends_the_sweep_and_leaves_the_cell(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    full = user_error("cannot write to the run directory", exit_code=Exit.STORAGE)
    with (
        mock.patch.object(RunDirectory, "create", side_effect=full),
        pytest.raises(UserError) as told,
    ):
        sweep.run()
    assert told.value.exit_code is Exit.STORAGE
    sweep.run()
    assert sweep.result().status == "done"
