"""Steps are those of the run, from its state or from another mode's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mpcli import checkpoint
from mpcli.diagnose.rerun import State, _PeakMemory, run_steps
from mpcli.diagnose.stage import Stage
from mpcli.plan import make_plan
from mpcli.recipe.errors import UserError
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan
from mpcli.trainer import settings
from tests.small import CPU, run_small, small_recipe


def planned(folder: Path, *overrides: str) -> tuple[Recipe, Plan]:
    recipe = small_recipe(folder, "train.steps=9", *overrides).recipe
    return recipe, make_plan(recipe, CPU)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "bf16-master", "bf16-pure"])
def test_the_steps_of_a_run_are_the_same_again(tmp_path: Path, mode: str) -> None:
    """Also where steps are sampled and counted, from fresh weights and from a checkpoint."""
    same = (f"precision.mode={mode}", "train.micro_batch_size=6", "train.steps=9")
    run, _ = run_small(tmp_path, *same, "output={checkpoint_every: 4 steps, keep_last: 9}")
    recipe, plan = planned(tmp_path, *same)
    tensors, _ = checkpoint.load(checkpoint.completed(run.checkpoints_path)[-1])
    rows = [(row.step, row.loss, row.grad_norm, row.lr, row.applied) for row in run.steps()]
    for start in (State(0, None), State(4, tensors)):
        found = run_steps(recipe, plan, start, 9, lambda text: None)
        seen = [(row.step, row.loss, row.grad_norm, row.lr, row.applied) for row in found.rows]
        assert [row[:3] for row in seen] == [row[:3] for row in rows[start.attempted :]]
        assert all(row[4] for row in seen)
        torch.testing.assert_close(
            [row[3] for row in seen], [r[3] for r in rows[start.attempted :]]
        )


MODES = {
    "fp32": ["precision.mode=fp32"],
    "fp16": ["precision.mode=fp16"],
    "bf16": ["precision.mode=bf16"],
    "bf16-master": ["precision.mode=bf16-master"],
    "fp16-master": ["precision.mode=fp16-master"],
    "fp16-pure": ["precision.mode=fp16-pure"],
    "adam": ["optim={kind: adam, lr: 0.01}"],
    "ema": ["train.ema=0.9"],
}


@pytest.mark.parametrize("after", MODES)
@pytest.mark.parametrize("before", ["fp32", "bf16-master", "fp16-pure", "adam"])
def test_weights_go_over_exactly(tmp_path: Path, before: str, after: str) -> None:
    first, plan = planned(tmp_path, *MODES[before])
    with settings(first, plan):
        stage = Stage(first, plan)
        for step in range(1, 3):
            stage.run(step)
        tensors, _ = stage.engine.checkpoint()
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        exact = {name: tensor.clone() for name, tensor in stage.engine.weights().items()}
    second, plan = planned(tmp_path, *MODES[after])
    with settings(second, plan):
        other = Stage(second, plan)
        torch.rand(1)
        other.engine.adopt(tensors, 2)
        for name, weight in other.engine.weights().items():
            assert torch.equal(weight, exact[name].to(weight.dtype)), name
        state, counts = other.engine.checkpoint()
        assert int(state["applied"]) == counts["attempted"] == 2
        assert torch.equal(state["rng.cpu"], tensors["rng.cpu"])
        for name, tensor in state.items():
            if name.startswith(("optimizer.", "average.")) and name in tensors:
                assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name
            if name.startswith("model."):
                bare = name.removeprefix("model.")
                assert torch.equal(tensor, exact[bare].to(tensor.dtype))
        for buffer, kept in zip(other.engine.buffers, other.engine.buffers_before, strict=True):
            assert torch.equal(buffer, kept)


@pytest.mark.parametrize(
    ("policy", "scale"),
    [
        ("{kind: dynamic, init_scale: 256}", 256),
        ("{kind: static, scale: 32}", 32),
        ("{kind: scheduled, points: [[0, 8], [3, 4], [5, 2]]}", 4),
        ("{kind: dynamic, init_scale: 8, min_scale: [[0, 1], [3, 16]]}", 16),
    ],
)
def test_another_loss_scale_begins_as_its_policy_says(
    tmp_path: Path, policy: str, scale: float
) -> None:
    recipe, plan = planned(tmp_path, f"precision={{mode: fp16, loss_scale: {policy}}}")
    with settings(recipe, plan):
        engine = Stage(recipe, plan).engine
        tensors, _ = engine.checkpoint()
        given = {name: tensor.clone() for name, tensor in tensors.items()}
        given["scaler.scale"] = torch.tensor(2.0**20)
        engine.adopt(given, 4)
        assert float(engine.scaler.scale) == 2.0**20
        engine = Stage(recipe, plan).engine
        engine.adopt({k: v for k, v in given.items() if not k.startswith("scaler.")}, 4)
        assert (float(engine.scaler.scale), engine.scaler.attempted) == (scale, 4)
        gradient = torch.ones(1)
        engine.scaler.unscale_([gradient])
        assert float(gradient) == 1 / scale


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"model.head.weight": None}, "`model.head.weight` is missing"),
        ({"model.head.weight": torch.zeros(2)}, "`model.head.weight` is float32 [2]"),
        ({"applied": torch.tensor([9])}, "9 of 2 steps are applied"),
        ({"rng.cpu": None}, "random numbers"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    tmp_path: Path, changed: dict[str, torch.Tensor | None], why: str
) -> None:
    recipe, plan = planned(tmp_path)
    with settings(recipe, plan):
        engine = Stage(recipe, plan).engine
        tensors = {name: tensor.clone() for name, tensor in engine.checkpoint()[0].items()}
        given = {k: v for k, v in (tensors | changed).items() if v is not None}
        with pytest.raises(UserError, match=why.replace("[", r"\[")) as error:
            engine.adopt(given, 2)
    assert error.value.exit_code == 4


def test_memory_is_what_tensors_hold_at_once(tmp_path: Path) -> None:
    recipe, plan = planned(tmp_path)
    with settings(recipe, plan):
        stage = Stage(recipe, plan)
        memory = _PeakMemory(stage)
        before = memory.peak
        kept = []
        with memory:
            torch.zeros(100_000).add_(1)  # gone at once
            kept.append(torch.ones(50_000))
            kept.append(kept[0][:10])  # the same storage
            torch.zeros(60_000, dtype=torch.float16)
        assert memory.peak - before == 4 * 100_000
        with memory:
            kept.append(torch.ones(200_000))
        assert memory.peak - before == 4 * 250_000


def test_what_a_backward_needs_counts(tmp_path: Path) -> None:
    recipe, plan = planned(tmp_path)
    layers = nn.Sequential(*(nn.Tanh() for _ in range(10)))
    inputs = torch.ones(1000, requires_grad=True)
    with settings(recipe, plan):
        stage = Stage(recipe, plan)
        memory = _PeakMemory(stage)
        before = memory.peak
        with memory:
            layers(inputs).sum().backward()
    assert 4000 * 10 <= memory.peak - before <= 4000 * 14
