"""Everything is derived, and every problem found, before a tensor is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpcli.machine import Machine
from mpcli.plan import MAX_STEPS, make_plan
from mpcli.recipe.errors import Exit, UserError
from tests.small import CPU, small_recipe


def problems(folder: Path, *overrides: str, machine: Machine = CPU) -> dict[str, tuple[str, Exit]]:
    with pytest.raises(UserError) as caught:
        make_plan(small_recipe(folder, *overrides).recipe, machine)
    return {p.path: (p.what, p.exit_code) for p in caught.value.problems}


def test_counts(tmp_path: Path) -> None:
    plan = make_plan(
        small_recipe(
            tmp_path, "train={epochs: 3, global_batch_size: 100, micro_batch_size: 30}"
        ).recipe,
        CPU,
    )
    assert (plan.num_train, plan.num_eval) == (1437, 360)
    assert (plan.steps_per_epoch, plan.steps) == (14, 42)
    assert (plan.micro_batch_size, plan.accumulation) == (30, 4)
    assert plan.device == "cpu"
    assert plan.parameters == sum(module.parameters for module in plan.modules)


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_precision_of_every_module_is_what_autocast_does(tmp_path: Path, mode: str) -> None:
    plan = make_plan(small_recipe(tmp_path, f"precision.mode={mode}").recipe, CPU)
    by_type = {module.type: module for module in plan.modules}
    for kind in ("Conv2d", "Linear"):
        assert by_type[kind].computed == mode
        assert by_type[kind].stored == by_type[kind].gradient == "fp32"
    assert by_type["BatchNorm2d"].computed == mode
    plan = make_plan(small_recipe(tmp_path, "precision.mode=fp32").recipe, CPU)
    assert {module.computed for module in plan.modules} == {"fp32"}


def test_all_problems_together(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "engine.device=cuda",
        "train.global_batch_size=2000",
        "task.model={kind: torchvision, name: resnet81}",
    )
    assert set(found) == {"engine.device", "train.global_batch_size", "task.model.name"}
    assert found["engine.device"][1] == Exit.ENVIRONMENT


def test_a_model_that_cannot_take_the_images(tmp_path: Path) -> None:
    found = problems(tmp_path, "task.model={kind: torchvision, name: alexnet}")
    assert "1x8x8" in found["task.model"][0]


@pytest.mark.parametrize(
    "train", ["global_batch_size: 1", "global_batch_size: 9, micro_batch_size: 4"]
)
def test_a_single_image_is_too_few_for_batchnorm_on_one_pixel(tmp_path: Path, train: str) -> None:
    model = "task.model={kind: torchvision, name: resnet18}"
    found = problems(tmp_path, model, f"train={{steps: 1, {train}}}")
    assert "BatchNorm" in found["train.micro_batch_size"][0]


def test_too_many_steps(tmp_path: Path) -> None:
    assert "train.steps" in problems(tmp_path, f"train.steps={MAX_STEPS + 1}")


def test_missing_data_is_a_problem_of_the_environment(tmp_path: Path) -> None:
    found = problems(tmp_path, f"data={{kind: cifar10, path: {tmp_path}}}")
    (what, code) = found["data.path"]
    assert str(tmp_path) in what
    assert code == Exit.ENVIRONMENT


def test_unsupported_and_emulated_precisions(tmp_path: Path) -> None:
    lacking = Machine(2, (), emulated={}, unsupported={"cpu": frozenset({"fp16"})})
    assert "precision.mode" in problems(tmp_path, "precision.mode=fp16", machine=lacking)
    emulating = Machine(2, (), emulated={"cpu": frozenset({"fp16"})}, unsupported={})
    plan = make_plan(small_recipe(tmp_path, "precision.mode=fp16").recipe, emulating)
    assert [warning.path for warning in plan.warnings] == ["precision.mode"]


@pytest.mark.parametrize(
    ("override", "finding"),
    [
        ("precision={mode: fp16, loss_scale: {kind: none}}", "underflow"),
        ("precision={mode: fp16, loss_scale: {kind: static, scale: 0.0002}}", "underflow"),
        ("precision={mode: fp16, loss_scale: {kind: static, scale: 1073741824}}", "scale-too-high"),
        ("precision={mode: bf16, loss_scale: {kind: dynamic}}", None),
    ],
)
def test_unsafe_recipes_are_warned_of(tmp_path: Path, override: str, finding: str | None) -> None:
    (warning,) = make_plan(small_recipe(tmp_path, override).recipe, CPU).warnings
    assert warning.finding == finding
    assert warning.path.startswith("precision.loss_scale")


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_safe_recipes_are_not(tmp_path: Path, mode: str) -> None:
    assert make_plan(small_recipe(tmp_path, f"precision.mode={mode}").recipe, CPU).warnings == ()


def test_planning_makes_no_weights(tmp_path: Path) -> None:
    """A model of 7 GB is planned in no memory."""
    before = torch.random.get_rng_state()
    plan = make_plan(small_recipe(tmp_path, "task.model.width=4096").recipe, CPU)
    assert plan.parameters > 10**9
    assert torch.equal(before, torch.random.get_rng_state())
