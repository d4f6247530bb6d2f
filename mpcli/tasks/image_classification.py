"""One label per image."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.image_dataset import ImageDataset
from mpcli.data.image_sources import describe, load
from mpcli.data.images import ImageInfo
from mpcli.recipe.data import ImageData
from mpcli.recipe.task import ImageClassification, ResNet9, SmallNet, TorchvisionModel, Vit
from mpcli.tasks import torchvision_models, vision

Options = ImageClassification


def load_data(options: Options, data: ImageData) -> ImageDataset:
    """The images that `data` names, described from their metadata.

    Raises:
        UserError: exit 3, when there is no such data.
    """
    return ImageDataset(
        describe(data),
        partial(load, data),
        augment=data.augment,
        channels_last=options.channels_last,
        normalise=data.normalise,
    )


def build_model(options: Options, info: ImageInfo) -> nn.Module:
    """The model with fresh weights, on torch's default device.

    Raises:
        UserError: no such torchvision model, or one that cannot be built for these images.
    """
    channels, height, width = info.input_shape
    model: nn.Module
    match options.model:
        case SmallNet():
            size = min(height, width)
            model = vision.SmallNet(channels, size, info.num_classes, width=options.model.width)
        case ResNet9():
            model = vision.ResNet9(channels, info.num_classes, width=options.model.width)
        case Vit():
            model = torchvision_models.build_vit(options.model, info)
        case TorchvisionModel():
            model = torchvision_models.build(options.model, info)
        case _:
            assert_never(options.model)
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def loss(options: Options, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy with label smoothing, summed over the images in fp32, and their number."""
    losses = F.cross_entropy(
        model(batch["inputs"]).float(),
        batch["targets"],
        reduction="sum",
        label_smoothing=options.label_smoothing,
    )
    return losses, batch.weight


def evaluate(options: Options, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross-entropy (without label smoothing) and accuracy (0..1) over all images."""
    num_images = 0
    sums: list[Tensor] = []
    for batch in batches:
        logits = model(batch["inputs"]).float()
        losses = F.cross_entropy(logits, batch["targets"], reduction="sum")
        correct = (logits.argmax(1) == batch["targets"]).sum()
        sums.append(torch.stack((losses.double(), correct.double())))
        num_images += batch.weight
    loss_sum, num_correct = torch.stack(sums).sum(0).tolist()
    return {"loss": loss_sum / num_images, "accuracy": num_correct / num_images}
