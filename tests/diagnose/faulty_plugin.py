"""A task with a fault in one layer, at the step whose batch holds a marked sample."""

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from mpcli.data import TensorDataset
from mpcli.recipe.plugin import Plugin


class Options(Plugin):
    model: Literal["mlp", "conv", "transformer", "residual"]
    layer: str  # its name, or `loss`
    fault: Literal["none", "forward-overflow", "backward-nan", "backward-inf", "loss-nan"]


def load_data(options: Options, data: Any) -> TensorDataset:
    torch.manual_seed(0)
    splits = []
    for number in (32, 8):
        targets = torch.arange(number) % 3
        inputs = torch.randn(number, 16) + targets[:, None]
        splits.append({"inputs": inputs, "targets": targets, "marked": torch.arange(number) == 5})
    return TensorDataset(*splits, source="random numbers")


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        hidden = self.encoder(self.embed(inputs.view(-1, 4, 4)), mask, is_causal=True)
        return self.head(hidden.mean(1))


class Block(nn.Module):
    """Its activation and its sum are its own operations: no module has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def own(self, values):
        return values

    def forward(self, values):
        return values + self.down(self.own(F.gelu(self.up(self.norm(values)))))


def build_model(options: Options, info: Any) -> nn.Module:
    if options.model == "mlp":
        model = nn.Sequential(
            nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )
    elif options.model == "conv":
        block = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
        model = nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), *block, nn.Flatten(),
            nn.Linear(64, 3),
        )  # fmt: skip
    elif options.model == "transformer":
        model = Transformer()
    else:
        model = nn.Sequential(Block(), Block(), Block(), nn.Linear(16, 3))
    if options.fault not in ("none", "loss-nan"):
        layer = model.get_submodule(options.layer)
        name = "own" if isinstance(layer, Block) else "forward"
        setattr(layer, name, partial(spoilt, layer, getattr(layer, name), options.fault))
    return model


def spoilt(layer, forward, fault, *inputs):
    values = forward(*inputs)
    if not getattr(layer, "marked", False):
        return values
    if fault == "forward-overflow":  # of fp16 alone
        return values * 2.0**20 / 2.0**20
    if fault == "backward-inf":  # of fp16 alone, and of a scaled loss
        return values * 2.0**-17 * 2.0**17
    # The NaN of a root that is not taken, whose gradient is 0 * NaN.
    return values + torch.where(values > math.inf, (values - 1e4).sqrt(), 0.0)


def loss(options: Options, model: nn.Module, batch):
    marked = batch["marked"]
    is_marked = not isinstance(marked, FakeTensor) and bool(marked.any())
    if options.layer != "loss":
        model.get_submodule(options.layer).marked = is_marked
    logits = model(batch["inputs"]).float()
    total = F.cross_entropy(logits, batch["targets"], reduction="sum")
    if options.fault == "loss-nan" and is_marked:  # with a finite gradient
        total = total + (logits - logits.max() - 1.0).log().sum()
    return total, batch.weight


def evaluate(options: Options, model: nn.Module, batches) -> dict[str, float]:
    losses, weight = [], 0
    for batch in batches:
        losses.append(F.cross_entropy(model(batch["inputs"]).float(), batch["targets"]))
        weight += 1
    return {"loss": (torch.stack(losses).sum() / weight).item()}
