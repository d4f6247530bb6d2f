"""torchvision's models by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from mpcli.data.images import ImageInfo
from mpcli.plan import make_plan
from mpcli.recipe.errors import Problem, UserError
from mpcli.recipe.task import ImageClassification, TorchvisionModel
from mpcli.tasks import image_classification, torchvision_models
from tests.small import CPU, small_recipe
from tests.tiny_cifar import write_tiny_cifar

DIGITS = ImageInfo(1437, 360, (1, 8, 8), 10, "test")
CIFAR = ImageInfo(50_000, 10_000, (3, 32, 32), 100, "test")

SMALLEST = [
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3",
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18",
    "resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16",
    "wide_resnet50_2",
]
FAMILIES = " ".join(SMALLEST).split()
TOO_LARGE = {"alexnet", "inception_v3", "maxvit_t"}  # for 32x32 images
WITH_STEM = {name for name in FAMILIES if torchvision_models.has_cifar_stem(name)}


def build(name: str, info: ImageInfo, stem: Literal["imagenet", "cifar"] = "imagenet") -> nn.Module:
    """On the meta device, with a forward pass."""
    model = TorchvisionModel(kind="torchvision", name=name, stem=stem)
    task = ImageClassification(kind="image-classification", model=model)
    with torch.device("meta"):
        built = image_classification.build_model(task, info)
    assert built(torch.empty(2, *info.input_shape, device="meta")).shape == (2, info.num_classes)
    return built


def problem(name: str, info: ImageInfo, stem: Literal["imagenet", "cifar"] = "imagenet") -> Problem:
    with pytest.raises(UserError) as caught:
        build(name, info, stem)
    (only,) = caught.value.problems
    return only


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_built_for_cifar_or_refused(name: str):
    if name in TOO_LARGE:
        with pytest.raises(
            (UserError, RuntimeError), match=r"too small|greater than|cannot be built"
        ):
            build(name, CIFAR)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(name, CIFAR)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def convolution_sizes(model: nn.Module) -> list[int]:
    """Pixels per side after each convolution, for 32x32 images."""
    sizes: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
    model(torch.empty(2, 3, 32, 32, device="meta"))
    return sizes


@pytest.mark.parametrize("name", sorted(WITH_STEM))
def test_a_cifar_stem_keeps_the_resolution(name: str):
    small, usual = (convolution_sizes(build(name, CIFAR, stem)) for stem in ("cifar", "imagenet"))
    assert small[0] == 32 and usual[0] < 32
    assert small[1] >= 2 * usual[1]


@pytest.mark.parametrize("name", sorted(WITH_STEM))
def test_a_cifar_stem_takes_one_channel_of_8x8(name: str):
    assert build(name, DIGITS, "cifar").state_dict()


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - WITH_STEM))
def test_a_cifar_stem_is_refused_where_it_has_no_meaning(name: str):
    said = problem(name, CIFAR, "cifar")
    assert said.path == "task.model.stem" and "resnet" in (said.hint or "")


def test_the_families_tried_here_are_all_of_torchvisions():
    from torchvision import models

    def families(names: list[str]) -> set[str]:
        return {name.rstrip("0123456789").split("_")[0].rstrip("0123456789") for name in names}

    assert families(models.list_models(module=models)) == families(FAMILIES)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet19", "did you mean `resnet18`?"),
        ("ResNet50", "did you mean `resnet50`?"),
        ("fasterrcnn_resnet50_fpn", None),
        ("quantized_resnet18", None),
    ],
)
def test_an_unknown_name_is_refused_with_what_is_near(name: str, hint: str | None):
    said = problem(name, CIFAR)
    assert said.path == "task.model.name"
    assert said.what == f"torchvision has no classification model `{name}`"
    assert hint is None or said.hint == hint


def test_a_patch_that_does_not_fit_is_refused():
    assert "cannot be built for 8x8 images" in problem("vit_b_16", DIGITS).what


def test_the_first_convolution_of_another_number_of_channels_keeps_its_shape():
    model = TorchvisionModel(kind="torchvision", name="resnet18")
    grey = torchvision_models.build(model, ImageInfo(9, 9, (1, 64, 64), 10, "test"))
    first = grey.get_submodule("conv1")
    assert isinstance(first, nn.Conv2d)
    assert (first.in_channels, first.kernel_size, first.stride) == (1, (7, 7), (2, 2))
    assert first.bias is None


def test_nothing_is_changed_where_nothing_needs_to_be():
    from torchvision import models

    model = TorchvisionModel(kind="torchvision", name="resnet18")
    torch.manual_seed(0)
    ours = torchvision_models.build(model, CIFAR).state_dict()
    torch.manual_seed(0)
    theirs = models.resnet18(weights=None, num_classes=100).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_every_model_is_built_or_refused(tmp_path: Path):
    from torchvision import models

    write_tiny_cifar(tmp_path / "data")
    data = f"data={{kind: cifar10, path: {tmp_path / 'data'}}}"
    for name in models.list_models(module=models):
        for stem in ("imagenet", "cifar"):
            try:
                build(name, CIFAR, stem)
            except UserError as error:
                assert error.problems[0].path.startswith("task.model")
            except (RuntimeError, ValueError, AssertionError):  # too large for such images
                model = f"task.model={{kind: torchvision, name: {name}, stem: {stem}}}"
                recipe = small_recipe(tmp_path, data, model, "train.global_batch_size=2").recipe
                with pytest.raises(UserError) as refused:
                    make_plan(recipe, CPU)
                assert refused.value.problems[0].path == "task.model"
