"""A task whose model has one odd layer, and whose batches may be bad from some step on."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from mpcli.data import TensorDataset
from mpcli.recipe.plugin import Plugin


class Options(Plugin):
    layer: Literal[
        "none", "overflow", "residual", "root", "log", "norm", "small-norm", "sum", "attention",
        "sharp-attention", "sound-attention", "fused-attention", "softmax", "amplify", "shrink",
        "torch-norm", "batch-norm", "nan-weights", "large-weights", "large-scale", "wide",
        "large-norm",
    ]  # fmt: skip
    batch: Literal["good", "nan", "huge", "label"] = "good"
    loss: float = 1.0  # a factor
    squares: float | None = None  # a factor of a sum of squares, which is the loss instead


def load_data(options: Options, data: Any) -> TensorDataset:
    torch.manual_seed(0)
    splits = []
    for number in (32, 8):
        targets = torch.arange(number) % 3
        inputs = torch.randn(number, 16) + targets[:, None]
        if options.batch != "good":
            spoil(options.batch, inputs, targets)
        splits.append({"inputs": inputs, "targets": targets})
    return TensorDataset(*splits, source="random numbers")


def spoil(how: str, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    if how == "nan":
        inputs[5, 3] = torch.nan
    elif how == "huge":
        inputs[5] *= 1e7
    else:
        targets[5] = 3


class Overflow(nn.Module):
    def forward(self, x):
        return x * 2.0**20 / 2.0**20


class Residual(nn.Module):
    """Its output itself is beyond fp16."""

    def forward(self, x):
        return x + x * 2.0**18


class Root(nn.Module):
    """Finite, with an infinite slope."""

    def forward(self, x):
        return x + (x - x.detach()).abs().sqrt()


class Log(nn.Module):
    def forward(self, x):
        return x + (-1 - x.detach().abs()).log()


class HandNorm(nn.Module):
    """A root mean square in the type of its input."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x):
        x = x * self.size
        return x / ((x * x).mean(-1, keepdim=True) + 1e-3).sqrt()


class Sum(nn.Module):
    def forward(self, x):
        return x + (x.abs() * 0 + 1e4).sum(-1, keepdim=True) * 1e-6


class Attention(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x.view(-1, 4, 4)
        query, key = self.query(x) * self.size, self.key(x) * self.size
        logits = query @ key.transpose(1, 2) / 2
        return (logits.softmax(-1) @ x.to(query.dtype)).flatten(1)


class FusedAttention(Attention):
    def forward(self, x):
        x = x.view(-1, 1, 4, 4)
        query, key = self.query(x) * self.size, self.key(x) * self.size
        return F.scaled_dot_product_attention(query, key, x.to(query.dtype)).flatten(1)


class Written(nn.Module):
    """A softmax without a maximum taken off."""

    def forward(self, x):
        x = (x * 20).exp()
        return x / x.sum(-1, keepdim=True)


class Amplify(nn.Module):
    """Large inside of its backward."""

    def forward(self, x):
        return x * 2.0**-17 * 2.0**17


class Shrink(nn.Module):
    """The gradients before it are small."""

    def forward(self, x):
        return x.detach() + (x - x.detach()) * 2.0**-36


class Scale(nn.Module):
    """A large parameter that no product multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((16,), 7e4))

    def forward(self, x):
        return (x.float() * self.weight / 7e4).to(x.dtype)


class Wide(nn.Module):
    """Returns, in fp32, what fp16 cannot hold."""

    def forward(self, x):
        return x.float() * 2.0**20


class Large(nn.Module):
    def forward(self, x):
        return x * 3e3


def filled(value: float) -> nn.Linear:
    """With one weight of that value."""
    line = nn.Linear(16, 16)
    with torch.no_grad():
        line.weight[0, 0] = value
    return line


def build_model(options: Options, info: Any) -> nn.Module:
    odd = {
        "none": nn.Identity, "overflow": Overflow, "residual": Residual, "root": Root, "log": Log,
        "norm": lambda: HandNorm(1e3), "small-norm": lambda: HandNorm(1.0), "sum": Sum,
        "attention": lambda: Attention(1e3), "sharp-attention": lambda: Attention(100.0),
        "sound-attention": lambda: Attention(1.0), "amplify": Amplify, "shrink": Shrink,
        "fused-attention": lambda: FusedAttention(100.0), "softmax": Written,
        "torch-norm": lambda: nn.LayerNorm(16), "batch-norm": lambda: nn.BatchNorm1d(16),
        "nan-weights": lambda: filled(torch.nan), "large-weights": lambda: filled(7e4),
        "large-scale": Scale, "wide": Wide,
        "large-norm": lambda: nn.Sequential(Large(), HandNorm(1)),
    }[options.layer]()  # fmt: skip
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), odd, nn.Linear(16, 16), nn.Linear(16, 3))


def loss(options: Options, model: nn.Module, batch):
    logits = model(batch["inputs"])
    if options.squares is not None:
        return (options.squares * (logits - 1).square().sum()).float(), batch.weight
    logits = logits.float()
    targets = batch["targets"]
    if isinstance(targets, FakeTensor):
        targets = torch.zeros_like(targets)
    total = F.cross_entropy(logits, targets, reduction="sum")
    return total * options.loss, batch.weight


def evaluate(options: Options, model: nn.Module, batches) -> dict[str, float]:
    losses = [F.cross_entropy(model(b["inputs"]).float(), b["targets"]) for b in batches]
    return {"loss": torch.stack(losses).mean().item()}
