"""Loss, evaluation and models of image classification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mpcli.data.batch import Batch
from mpcli.data.images import ImageInfo
from mpcli.recipe.data import Digits
from mpcli.recipe.task import ImageClassification
from mpcli.tasks import image_classification, task_of

DIGITS = ImageInfo(1437, 360, (1, 8, 8), 10, "test")
CIFAR = ImageInfo(50_000, 10_000, (3, 32, 32), 10, "test")


def task(model: dict[str, Any] | None = None, **options: Any) -> ImageClassification:
    model = model or {"kind": "smallnet", "width": 8}
    return ImageClassification.model_validate(
        {"kind": "image-classification", "model": model, **options}
    )


def batch(info: ImageInfo, num_images: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_images, *info.input_shape, generator=generator)
    targets = torch.randint(info.num_classes, (num_images,), generator=generator)
    return Batch({"inputs": inputs, "targets": targets})


def test_the_task_is_carried_out_by_its_module():
    assert task_of(task()) is image_classification


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_sum_whose_mean_is_torchs(smoothing: float):
    chosen = task(label_smoothing=smoothing)
    model, images = image_classification.build_model(chosen, CIFAR), batch(CIFAR)
    loss, weight = image_classification.loss(chosen, model, images)
    mean = F.cross_entropy(model(images["inputs"]), images["targets"], label_smoothing=smoothing)
    torch.testing.assert_close(loss / weight, mean)
    assert weight == images.weight == 12


def test_sums_over_micro_batches_add_up_to_the_whole():
    chosen = task(label_smoothing=0.1)
    model, images = image_classification.build_model(chosen, CIFAR).eval(), batch(CIFAR)
    whole, _ = image_classification.loss(chosen, model, images)
    parts = [image_classification.loss(chosen, model, part) for part in images.split(5)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    assert sum(weight for _, weight in parts) == 12


def test_the_loss_is_fp32_under_autocast():
    chosen = task()
    model = image_classification.build_model(chosen, CIFAR)
    with torch.autocast("cpu", torch.bfloat16):
        assert image_classification.loss(chosen, model, batch(CIFAR))[0].dtype == torch.float32


def test_evaluation_equals_a_loop_over_single_images():
    chosen = task(label_smoothing=0.3)
    model = image_classification.build_model(chosen, CIFAR)
    batches = [batch(CIFAR, 12, 1), batch(CIFAR, 5, 2)]
    losses, correct = [], []
    model.eval()
    with torch.no_grad():
        metrics = image_classification.evaluate(chosen, model, batches)
        for numbered in batches:
            for image, label in zip(numbered["inputs"], numbered["targets"], strict=True):
                probabilities = model(image.unsqueeze(0)).softmax(1)[0]
                losses.append(-probabilities[label].log().item())
                correct.append(probabilities.argmax().item() == label.item())
    assert metrics["loss"] == pytest.approx(sum(losses) / 17, rel=1e-5)
    assert metrics["accuracy"] == sum(correct) / 17


def test_digits_are_learnt():
    chosen = task({"kind": "smallnet", "width": 16})
    data = image_classification.load_data(chosen, Digits(kind="digits"))
    data.prepare(torch.device("cpu"))
    torch.manual_seed(0)
    model = image_classification.build_model(chosen, data.info)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(44):
        loss, weight = image_classification.loss(chosen, model, data.train_batch(0, step, 64))
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        metrics = image_classification.evaluate(chosen, model.eval(), data.eval_batches(360))
    assert metrics["accuracy"] > 0.9


MODELS = [
    {"kind": "smallnet"},
    {"kind": "resnet9"},
    {"kind": "vit", "heads": 1},
    {"kind": "torchvision", "name": "resnet18"},
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["kind"])
@pytest.mark.parametrize("info", [DIGITS, CIFAR], ids=["digits", "cifar"])
def test_a_model_takes_what_its_description_says(model: dict[str, Any], info: ImageInfo):
    with torch.device("meta"):
        built = image_classification.build_model(task(model), info)
    assert built(torch.empty(2, *info.input_shape, device="meta")).shape == (2, info.num_classes)
    assert all(tensor.is_meta for tensor in built.state_dict().values())


@pytest.mark.parametrize("size", range(1, 13))
def test_smallnet_fits_every_small_image(size: int):
    info = ImageInfo(10, 10, (2, size, size), 7, "test")
    model = image_classification.build_model(task(), info)
    assert model(torch.randn(3, 2, size, size)).shape == (3, 7)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["kind"])
def test_weights_follow_the_seed(model: dict[str, Any]):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        built = image_classification.build_model(task({**model, **small}), CIFAR)
        return torch.cat([parameter.flatten() for parameter in built.parameters()])

    small = {} if model["kind"] == "torchvision" else {"width": 4}
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_channels_last_is_a_matter_of_memory_only():
    torch.manual_seed(0)
    usual = image_classification.build_model(task(), CIFAR)
    torch.manual_seed(0)
    nhwc = image_classification.build_model(task(channels_last=True), CIFAR)
    for one, other in zip(usual.parameters(), nhwc.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.dim() < 4 or other.is_contiguous(memory_format=torch.channels_last)
