"""The text of `final/load.py`: an image classifier without this program."""

from __future__ import annotations

import inspect
from typing import assert_never

from torch import nn

from mpcli.data.image_dataset import ImageDataset
from mpcli.recipe.task import ImageClassification, ResNet9, SmallNet, TorchvisionModel, Vit
from mpcli.tasks import torchvision_models, vision

_TEXT = '''\
"""Build the trained model and prepare images for it: needs torch, safetensors{torchvision}.

    from load import CLASSES, load, prepare
    logits = load()(prepare(images))
"""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
{imports}
CLASSES = {classes}
MEAN = {mean}  # of the training images' channels
STD = {std}

{classes_of_model}
def load(folder: Path = Path(__file__).parent) -> nn.Module:
    """The model with its trained weights, in evaluation mode."""
{build}
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def prepare(images: Tensor) -> Tensor:
    """uint8 [N, {channels}, {height}, {width}] as stored -> what the model takes."""
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    return (images.float() - mean.view(-1, 1, 1)) * (1 / std).view(-1, 1, 1)
'''


def loader_text(options: ImageClassification, data: ImageDataset, model: nn.Module) -> str:
    """Python source that builds `model`; it reads `model.safetensors` beside itself.

    Args:
        data: as it was read.
        model: what `build_model` made of both.
    """
    info = data.info
    channels, height, width = info.input_shape
    sources: list[type[nn.Module]] = []
    match options.model:
        case SmallNet():
            sources = [vision.ConvBlock, vision.SmallNet]
            arguments = f"{channels}, {min(height, width)}, {info.num_classes}"
            build = [f"model = SmallNet({arguments}, width={options.model.width})"]
        case ResNet9():
            sources = [vision.ConvBlock, vision.Residual, vision.ResNet9]
            build = [
                f"model = ResNet9({channels}, {info.num_classes}, width={options.model.width})"
            ]
        case Vit():
            build = torchvision_models.vit_statements(options.model, info, model)
        case TorchvisionModel():
            build = torchvision_models.statements(options.model, info, model)
        case _:
            assert_never(options.model)
    of_torchvision = not sources
    return _TEXT.format(
        torchvision=" and torchvision" if of_torchvision else "",
        imports="from torchvision import models\n" if of_torchvision else "",
        classes=list(info.classes),
        mean=data.mean.tolist(),
        std=data.std.tolist(),
        classes_of_model="".join(f"\n{inspect.getsource(source)}\n" for source in sources),
        build="\n".join(f"    {line}" for line in build),
        channels=channels,
        height=height,
        width=width,
    )
