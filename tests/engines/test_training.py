"""The whole training loop in one process and in two: what they see, decide and tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mpcli import checkpoint, outcomes
from mpcli.checkpoint.layout import completed
from mpcli.data.batch import Batch
from mpcli.engines.base import LossFunction
from mpcli.engines.local import LocalEngine
from mpcli.launch import trained
from mpcli.plan import make_plan
from mpcli.progress import Progress
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.changes import allowed_changes
from mpcli.recipe.load import load_recipe
from mpcli.records import EvalRecord, StepRecord
from mpcli.rundir import RunDirectory
from mpcli.signals import handled, held
from tests import small
from tests.ranks import Group
from tests.small import small_recipe

TWO = "device: cpu, processes: 2, timeout_seconds: 30"
ENGINES = {
    "local": "engine={kind: local, device: cpu}",
    "ddp": f"engine={{kind: ddp, {TWO}}}",
    "fsdp2": f"engine={{kind: fsdp2, {TWO}}}",
}
EVERY_4 = "output={checkpoint_every: 4 steps, keep_last: 9}"


@dataclass
class Told:
    """What a rank saw and said.

    Attributes:
        samples: trained on in each step.
        blocks: of rows, as they came.
    """

    status: str = ""
    samples: dict[int, list[bytes]] = field(default_factory=dict)
    blocks: list[list[StepRecord]] = field(default_factory=list)
    evaluations: list[EvalRecord] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)


class Display(small.Silent):
    """Remembers which rows came together."""

    def __init__(self, told: Told) -> None:
        super().__init__()
        self.told = told
        self.evaluations = told.evaluations

    def steps(self, rows: Sequence[StepRecord]) -> None:
        self.told.blocks.append(list(rows))


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one rank.

    Attributes:
        nan_in: steps whose loss is not a number.
        slow: whether each of its steps takes long by its own clock.
    """

    rank: int
    nan_in: tuple[int, ...] = ()
    slow: bool = False


def take_part(ranks: Ranks, path: Path, fault: Fault | None = None) -> Told:
    """Train what a run directory says, as one of the ranks or alone."""
    run = RunDirectory.join(path, RunDirectory.read(path).attempt, ranks.rank)
    recipe = load_recipe(run.recipe_path).recipe
    told = Told()
    accumulate = LocalEngine.accumulate
    mine = fault if fault and fault.rank == ranks.rank else None

    def watched(
        engine: LocalEngine, loss_function: LossFunction, batch: Batch, weight: int, *, last: bool
    ) -> Tensor:
        inputs = batch["inputs"]
        told.samples.setdefault(run.step, []).extend(row.numpy().tobytes() for row in inputs)

        def broken(*arguments: Any) -> Any:
            loss, count = loss_function(*arguments)
            return loss * torch.nan, count

        wrong = mine and run.step in mine.nan_in
        return accumulate(engine, broken if wrong else loss_function, batch, weight, last=last)

    late = 0.0 if mine and mine.slow else outcomes.MAX_SECONDS
    with (
        patch.object(LocalEngine, "accumulate", watched),
        patch.object(outcomes, "MAX_SECONDS", late),
        handled(),
        held(),
    ):
        ending = trained(recipe, run, Display(told), told.progress, ranks)
    run.close()
    if ending.status == "failed":
        assert ending.error
        raise ending.error
    told.status = ending.status
    return told


def begin(folder: Path, engine: str, *overrides: str) -> Path:
    """A run that nobody has trained yet."""
    loaded = small_recipe(folder, ENGINES[engine], *overrides)
    path = folder / f"run-{engine}"
    RunDirectory.create(loaded, make_plan(loaded.recipe, small.CPU), {}, path).close()
    return path


def go_on(path: Path, engine: str, *overrides: str) -> None:
    """Another attempt at a run."""
    run = RunDirectory.open(path)
    loaded = load_recipe(run.recipe_path, (ENGINES[engine], *overrides))
    changes = allowed_changes(load_recipe(run.recipe_path).recipe, loaded)
    run.begin_attempt(loaded.recipe, make_plan(loaded.recipe, small.CPU), {}, changes)
    run.close()


def newest_tensors(path: Path) -> dict[str, Tensor]:
    tensors, _ = checkpoint.load(completed(path / "checkpoints")[0])
    return dict(tensors)


def rows(told: Told) -> list[StepRecord]:
    return [row for block in told.blocks for row in block]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_samples_come_in_the_same_order_in_1_and_2_and_1_process(
    pair: Group, tmp_path: Path, engine: str
) -> None:
    more_than_an_epoch = ("train.global_batch_size=250", "train.micro_batch_size=125", EVERY_4)
    path = begin(tmp_path, "local", "train.steps=12", *more_than_an_epoch)
    uninterrupted = take_part(ALONE, path)
    whole = uninterrupted.samples
    assert len({tuple(step) for step in whole.values()}) == 12

    (tmp_path / "parts").mkdir()
    path = begin(tmp_path / "parts", "local", "train.steps=4", *more_than_an_epoch)
    seen = take_part(ALONE, path).samples
    go_on(path, engine, "train.steps=8")
    one, other = (told.samples for told in pair.run(take_part, path))
    assert all(len(step) == 125 for step in (*one.values(), *other.values()))
    seen |= {step: one[step] + other[step] for step in one}
    go_on(path, "local", "train.steps=12")
    seen |= take_part(ALONE, path).samples
    assert seen == whole
    losses = [row.loss for row in RunDirectory.read(path).steps()]
    assert losses == pytest.approx([row.loss for row in rows(uninterrupted)], rel=1e-5)


VIT = "task.model={kind: vit, width: 8, heads: 1, layers: 1, mlp_width: 8, dropout: 0.1}"


def test_ranks_draw_random_numbers_of_their_own(pair: Group, tmp_path: Path) -> None:
    settings = (VIT, "train.steps=2", EVERY_4)
    path = begin(tmp_path, "ddp", *settings)
    pair.run(take_part, path)
    from_the_start = newest_tensors(path)
    assert not torch.equal(from_the_start["rng.cpu"], from_the_start["rng.cpu.1"])

    path = begin(tmp_path, "local", *settings)
    take_part(ALONE, path)
    assert "rng.cpu.1" not in newest_tensors(path)
    go_on(path, "ddp", "train.steps=4")
    pair.run(take_part, path)
    after_a_resume = newest_tensors(path)
    assert not torch.equal(after_a_resume["rng.cpu"], after_a_resume["rng.cpu.1"])
    # A rank that comes later does not draw what it would have drawn in the beginning.
    assert not torch.equal(after_a_resume["rng.cpu.1"], from_the_start["rng.cpu.1"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_metrics_of_rank_0_count_in_all(pair: Group, tmp_path: Path, engine: str) -> None:
    """Each has running statistics of BatchNorm of its own, and so other metrics."""
    keep_best = "output={keep_best: loss, checkpoint_every: null}"
    path = begin(tmp_path, engine, "train.steps=6", "eval.every=2 steps", keep_best)
    one, other = pair.run(take_part, path)
    metrics = [[row.metrics for row in told.evaluations] for told in (one, other)]
    assert len(metrics[0]) == 3
    assert metrics[0] == metrics[1]
    assert one.progress.best == other.progress.best


def take_part_and_ask_for_a_save(ranks: Ranks, path: Path) -> Told:
    """As a SIGUSR1 that reaches rank 1 alone, in step 2."""
    asked = iter([False, ranks.rank == 1])
    with patch("mpcli.trainer.save_asked", lambda: next(asked, False)):
        return take_part(ranks, path)


def test_a_save_is_made_though_every_step_is_followed_by_an_evaluation(
    pair: Group, tmp_path: Path
) -> None:
    no_others = "output={checkpoint_every: null}"
    path = begin(tmp_path, "ddp", "train.steps=6", "eval.every=1 steps", no_others)
    pair.run(take_part_and_ask_for_a_save, path)
    assert [saved.step for saved in completed(path / "checkpoints")] == [3]


@pytest.mark.parametrize("slow", [0, 1])
def test_rows_come_at_the_same_steps_whichever_rank_is_slow(
    pair: Group, tmp_path: Path, slow: int
) -> None:
    path = begin(tmp_path, "ddp", "train.steps=20")
    told = pair.run(take_part, path, Fault(slow, slow=True))
    blocks = [[len(block) for block in each.blocks] for each in told]
    assert blocks[0] == blocks[1]
    assert sum(blocks[0]) == 20


@pytest.mark.parametrize(("engine", "slow"), [("ddp", 0), ("ddp", 1), ("fsdp2", 1)])
def test_all_go_back_when_one_has_nan(pair: Group, tmp_path: Path, engine: str, slow: int) -> None:
    settings = ("train.steps=20", "train.on_nonfinite=rollback", EVERY_4)
    path = begin(tmp_path, engine, *settings)
    told = pair.run(take_part, path, Fault(slow, nan_in=(10,), slow=True))
    assert [each.status for each in told] == ["done", "done"]
    assert [each.progress.rollbacks for each in told] == [1, 1]
    (rollback,) = RunDirectory.read(path).rollbacks()
    assert (rollback.step, rollback.checkpoint) == (10, 8)
    for each in told:
        assert [row.step for row in rows(each) if not row.applied] == [10]
        assert (each.progress.attempted, each.progress.applied) == (20, 18)


def test_all_end_when_one_has_nan(pair: Group, tmp_path: Path) -> None:
    path = begin(tmp_path, "ddp", "train.steps=60", "train.on_nonfinite=stop")
    told = pair.run(take_part, path, Fault(1, nan_in=(10,), slow=True))
    assert [each.status for each in told] == ["diverged", "diverged"]
    last = [rows(each)[-1].step for each in told]
    assert last[0] == last[1] < 60
