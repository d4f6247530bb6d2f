"""Everything is derived, and every problem found, before a tensor is made."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torchvision import models

from mpcli.machine import Machine
from mpcli.plan import MAX_STEPS, make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import packaged_dir
from tests.small import CPU, small_recipe
from tests.tiny_cifar import write_tiny_cifar

GPU = Machine(cuda_devices=("x",), emulated={}, unsupported={})


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


def test_a_micro_batch_is_at_most_the_batch(tmp_path: Path) -> None:
    plan = make_plan(small_recipe(tmp_path, "train.micro_batch_size=64").recipe, CPU)
    assert (plan.micro_batch_size, plan.accumulation) == (16, 1)


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
    assert "inputs [16, 1, 8, 8]" in found["task.model"][0]


def test_a_model_that_images_are_too_small_for_says_so(tmp_path: Path) -> None:
    model = "task.model={kind: torchvision, name: densenet121}"
    with pytest.raises(UserError, match=r"cannot learn from .*too small") as caught:
        make_plan(small_recipe(tmp_path, model).recipe, CPU)
    (problem,) = caught.value.problems
    assert problem.path == "task.model" and "`stem: cifar`" in (problem.hint or "")


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
    lacking = Machine((), emulated={}, unsupported={"cpu": frozenset({"fp16"})})
    assert "precision.mode" in problems(tmp_path, "precision.mode=fp16", machine=lacking)
    emulating = Machine((), emulated={"cpu": frozenset({"fp16"})}, unsupported={})
    plan = make_plan(small_recipe(tmp_path, "precision.mode=fp16").recipe, emulating)
    assert [warning.path for warning in plan.warnings] == ["precision.mode"]


@pytest.mark.parametrize(("machine", "device"), [(CPU, "cpu"), (GPU, "cuda")])
def test_auto_is_a_gpu_if_there_is_one(tmp_path: Path, machine: Machine, device: str) -> None:
    recipe = small_recipe(tmp_path, "engine.device=auto").recipe
    assert make_plan(recipe, machine).device == device


@pytest.mark.parametrize(("machine", "compiler"), [(CPU, "g++"), (GPU, "gcc")])
def test_compiling_needs_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, compiler: str
) -> None:
    compiled = ("engine={kind: local, device: auto, compile: true}",)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == compiler else f"/{name}")
    what, code = problems(tmp_path, *compiled, machine=machine)["engine.compile"]
    assert compiler in what
    assert code == Exit.ENVIRONMENT
    monkeypatch.setattr(shutil, "which", lambda name: f"/{name}" if name == compiler else None)
    assert make_plan(small_recipe(tmp_path, *compiled).recipe, machine)


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "wandb", "trackio"])
def test_a_tracker_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = small_recipe(tmp_path, f"output.trackers=[{tracker}]").recipe
    with pytest.raises(UserError) as raised:
        make_plan(recipe, CPU)
    (problem,) = raised.value.problems
    assert problem.what == f"the package {tracker} is not installed"
    assert problem.hint == f"pip install 'mptrain[{tracker}]'"
    assert (problem.path, problem.exit_code) == ("output.trackers", Exit.ENVIRONMENT)


def test_a_model_without_blocks_has_nothing_to_recompute(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "task.model={kind: torchvision, name: alexnet}",
        "engine.activation_checkpointing=true",
    )
    assert "engine.activation_checkpointing" in found


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cifar")
    write_tiny_cifar(folder)
    return f"data={{kind: cifar10, path: {folder}}}"


FAMILIES = [
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5",
    "mobilenet_v3_small regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t",
    "vgg11 vit_b_16",
]
TOO_LARGE = {"alexnet", "inception_v3", "maxvit_t"}  # for 32x32 images


@pytest.mark.parametrize("name", " ".join(FAMILIES).split())
def test_every_family_is_planned_or_refused_in_silence(
    tmp_path: Path,
    tiny_cifar: str,
    name: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    overrides = (tiny_cifar, f"task.model={{kind: torchvision, name: {name}}}")
    if name in TOO_LARGE:
        (path,) = problems(tmp_path, *overrides)
        assert path.startswith("task.model")
    else:
        plan = make_plan(small_recipe(tmp_path, *overrides).recipe, CPU)
        assert plan.parameters > 100_000
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert recwarn.list == []


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_parameters_are_the_models_own(tmp_path: Path, tiny_cifar: str, name: str) -> None:
    overrides = (tiny_cifar, f"task.model={{kind: torchvision, name: {name}}}")
    model = models.get_model(name, weights=None, num_classes=10)
    plan = make_plan(small_recipe(tmp_path, *overrides).recipe, CPU)
    assert plan.parameters == sum(p.numel() for p in model.parameters())


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


RECIPES = sorted(packaged_dir("recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    write_tiny_cifar(tmp_path / "cifar10", num_train=1024)
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        rows = [f"sentence number {n},{n % 2}" for n in range(100)]
        (tmp_path / "sst2" / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]))
    monkeypatch.setenv("MPTRAIN_DATA", str(tmp_path))
    plan = make_plan(load_recipe(file).recipe, CPU)
    assert plan.steps > 0
    assert plan.warnings == ()


def test_patches_have_to_tile_the_images(tmp_path: Path) -> None:
    found = problems(tmp_path, "task.model={kind: vit, patch_size: 3}")
    assert "3x3 do not tile 8x8" in found["task.model.patch_size"][0]
