"""The plug-in of the benchmark: handwritten digits, and a model of `models.py`.

Its options are what a task may say, right or wrong; none of them is known to a check.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.diagnose.models import build
from mpcli.data import TensorDataset
from mpcli.recipe.plugin import Plugin

Family = Literal["convnet", "residual", "transformer", "mlp"]


class Options(Plugin):
    model: Family
    depth: int = 3
    block: int = -1  # that `norm`, `activation`, `init`, `attention` are of; -1: of all blocks
    norm: Literal["standard", "rms", "none"] = "standard"
    momentum: float = 0.1  # of a BatchNorm's running statistics
    activation: Literal[
        "relu", "sigmoid", "log", "margin", "scaled", "noisy", "gather"
    ] = "relu"  # fmt: skip
    offset: float = 1.0  # inside of a logarithm or a root
    gain: float = 1.0  # that `scaled` begins with
    own_generator: bool = False  # of `noisy`
    most: int = 0  # samples, of `gather`
    init: float = 1.0  # factor on the first weights of a block
    attention: float = 1.0  # factor on the first weights of queries and keys
    weights: str = ""  # a file to begin with
    largest_pixel: float = 1.0
    missing: float = 0.0  # share of the samples with a pixel that is not known, NaN
    extreme: float = 0.0  # share of the samples with a pixel of 1e30
    canvas: float = 1.0  # pixels that the loss is averaged over
    decode: float = 0.0  # weight of the error of decoded pixels
    float_sums: bool = False  # of that error


def load_data(options: Options, data: Any) -> TensorDataset:
    """1,437 training images and 360 others, always the same."""
    images, targets = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16 * options.largest_pixel
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    inputs = images[train]
    for share, value in ((options.missing, torch.nan), (options.extreme, 1e30)):
        inputs[: round(share * len(inputs)), 0, 3, 3] = value
    return TensorDataset(
        {"inputs": inputs, "targets": targets[train]},
        {"inputs": images[held_out], "targets": targets[held_out]},
        source="scikit-learn's digits",
    )


def build_model(options: Options, info: Any) -> nn.Module:
    return build(options)


def loss(options: Options, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    images, targets = batch["inputs"], batch["targets"]
    if not options.decode:
        total = F.cross_entropy(model(images).float(), targets, reduction="sum")
    else:
        logits, pixels = model(images, decode=True)
        errors = pixels - images.flatten(1).to(pixels.dtype)
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        if options.float_sums:
            errors = errors.float()
        total = total + options.decode * batch.weight * spread(errors).float()
    return total / options.canvas, batch.weight


def spread(errors: Tensor) -> Tensor:
    """Root of the variance and half of the squared mean, by sums (as Eigen et al. 2014, eq. 4)."""
    number, total = errors.numel(), errors.sum()
    return (number * errors.square().sum() - total.square() / 2).sqrt() / number


def evaluate(options: Options, model: nn.Module, batches: Any) -> dict[str, float]:
    """Mean cross-entropy of the logits, whatever is trained on."""
    total = weight = 0.0
    for batch in batches:
        logits = model(batch["inputs"]).float()
        total += F.cross_entropy(logits, batch["targets"], reduction="sum").item()
        weight += batch.weight
    return {"loss": total / weight}
