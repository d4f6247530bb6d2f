"""A task whose device has room for a few samples only, counted and not allocated."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from mpcli.data import TensorDataset
from mpcli.recipe.plugin import Plugin


class Options(Plugin):
    most: int  # samples that a forward has room for
    rank: int | None = None  # of the only process that is short of memory
    begins: int = 1  # forward passes with gradients that go well before it is
    evaluation: bool = False  # where it is short, instead of in training
    batch_norm: bool = False


passed = 0


def load_data(options: Options, data: Any) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    splits = []
    for number in (64, 16):
        inputs = torch.randn(number, 8, generator=generator)
        splits.append({"inputs": inputs, "targets": (inputs.sum(1) > 0).long()})
    return TensorDataset(*splits, source="halves of a space")


def build_model(options: Options, info: Any) -> nn.Module:
    norm = nn.BatchNorm1d(16) if options.batch_norm else nn.LayerNorm(16)
    return nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 2))


def _check_room(options: Options, inputs: torch.Tensor) -> None:
    global passed
    if isinstance(inputs, FakeTensor) or torch.is_grad_enabled() == options.evaluation:
        return
    passed += 1
    is_short = options.rank is None or int(os.environ.get("RANK", 0)) == options.rank
    if is_short and passed >= options.begins and len(inputs) > options.most:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def loss(options: Options, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    _check_room(options, batch["inputs"])
    logits = model(batch["inputs"]).float()
    return F.cross_entropy(logits, batch["targets"], reduction="sum"), batch.weight


def evaluate(options: Options, model: nn.Module, batches: Any) -> dict[str, float]:
    total = weight = 0.0
    for batch in batches:
        _check_room(options, batch["inputs"])
        logits = model(batch["inputs"]).float()
        total += F.cross_entropy(logits, batch["targets"], reduction="sum").item()
        weight += batch.weight
    return {"loss": total / weight}
