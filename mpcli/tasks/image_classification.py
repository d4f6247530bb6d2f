"""One label per image."""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcli.data import DatasetInfo, load
from mpcli.data.batch import Batch
from mpcli.data.dataset import ImageDataset
from mpcli.recipe.data import Data
from mpcli.recipe.errors import user_error
from mpcli.recipe.task import ImageClassification, ResNet9, SmallNet, TorchvisionModel
from mpcli.tasks import torchvision_models, vision


def load_data(task: ImageClassification, data: Data, device: torch.device) -> ImageDataset:
    """Both splits in the device's memory.

    Raises:
        UserError: exit 3, when the data is missing or damaged.
    """
    splits, info = load(data)
    return ImageDataset(
        splits, info, augment=data.augment, device=device, channels_last=task.channels_last
    )


def build_model(task: ImageClassification, info: DatasetInfo) -> nn.Module:
    """The model with fresh weights, on torch's default device.

    Raises:
        UserError: no such torchvision model, or one that cannot be built for these images.
    """
    channels, height, width = info.input_shape
    model: nn.Module
    match task.model:
        case SmallNet():
            size = min(height, width)
            model = vision.SmallNet(channels, size, info.num_classes, width=task.model.width)
        case ResNet9():
            model = vision.ResNet9(channels, info.num_classes, width=task.model.width)
        case TorchvisionModel():
            model = torchvision_models.build(task.model, info)
        case _:
            assert_never(task.model)
    return model.to(memory_format=torch.channels_last) if task.channels_last else model


def check_forward(
    task: ImageClassification, model: nn.Module, info: DatasetInfo, num_images: int
) -> None:
    """Run images through a model on the meta device or of fake tensors: only shapes.

    Raises:
        UserError: the model cannot take images of this size, or so few of them.
    """
    shape = "x".join(map(str, info.input_shape))
    images = torch.empty(num_images, *info.input_shape, device=next(model.parameters()).device)
    try:
        logits = model(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        if "more than 1 value per channel" in reason:  # BatchNorm
            raise user_error(
                f"this model cannot learn from {num_images} image of {shape} at a time: "
                "BatchNorm needs more than one value per channel",
                "let no micro-batch hold a single image",
                path="train.micro_batch_size",
            ) from error
        hint = "choose a model made for small images, such as `smallnet` or `resnet9`"
        if isinstance(task.model, TorchvisionModel):
            stem, name = task.model.stem, task.model.name
            if stem == "imagenet" and torchvision_models.has_cifar_stem(name):
                hint += ", or set `stem: cifar`"
        what = f"this model cannot take images of {shape}: {reason}"
        raise user_error(what, hint, path="task.model") from error
    assert logits.shape == (num_images, info.num_classes)


def weight(batch: Batch) -> int:
    """The number of images."""
    return batch.targets.shape[0]


def loss(task: ImageClassification, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy with label smoothing, summed over the images in fp32, and their number."""
    losses = F.cross_entropy(
        model(batch.inputs).float(),
        batch.targets,
        reduction="sum",
        label_smoothing=task.label_smoothing,
    )
    return losses, weight(batch)


@torch.no_grad()
def evaluate(
    task: ImageClassification, model: nn.Module, batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean cross-entropy (without label smoothing) and accuracy (0..1) over all images."""
    was_training = model.training
    model.eval()
    num_images = 0
    sums: list[Tensor] = []
    for batch in batches:
        logits = model(batch.inputs).float()
        losses = F.cross_entropy(logits, batch.targets, reduction="sum")
        correct = (logits.argmax(1) == batch.targets).sum()
        sums.append(torch.stack((losses.double(), correct.double())))
        num_images += weight(batch)
    model.train(was_training)
    loss_sum, num_correct = torch.stack(sums).sum(0).tolist()
    return {"loss": loss_sum / num_images, "accuracy": num_correct / num_images}
