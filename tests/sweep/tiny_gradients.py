"""A task with gradients far below fp16's range, and one where they pass through a valley."""

from typing import Any

import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn, tensor

from mpcli.data import TensorDataset
from mpcli.recipe.plugin import Plugin


class Options(Plugin):
    factor: float = 1e-4  # on the loss
    dense: bool = False  # linear layers instead of convolutions
    valley: float = 1.0  # on the gradient between two layers, and its inverse behind


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factor


def load_data(options: Options, data: Any) -> TensorDataset:
    digits = load_digits()
    images = tensor(digits.images).float().unsqueeze(1) / 8 - 1
    targets = tensor(digits.target)
    splits = [
        {"images": images[part], "targets": targets[part]}
        for part in (slice(300, None), slice(300))
    ]
    return TensorDataset(*splits, source="scikit-learn's digits", info=10)


def build_model(options: Options, info: Any) -> nn.Module:
    """No norms, so gradients shrink from layer to layer."""
    layers: list[nn.Module] = []
    if options.dense:
        for width in (64, 128, 128, 128, 128):
            layers += [nn.Linear(width, 128), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, info))
    for channels in (1, 16, 16, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
    if options.valley != 1:
        layers[4:4] = [Times(1 / options.valley), Times(options.valley)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 8 * 8, info))


def loss(options: Options, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    logits = model(batch["images"]).float()
    total = F.cross_entropy(logits, batch["targets"], reduction="sum")
    return total * options.factor, batch.weight


def evaluate(options: Options, model: nn.Module, batches: Any) -> dict[str, float]:
    sums = [(loss(options, model, batch)[0].item(), batch.weight) for batch in batches]
    return {"loss": sum(one for one, _ in sums) / sum(weight for _, weight in sums)}
