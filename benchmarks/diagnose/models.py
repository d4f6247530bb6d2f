"""Four families of small classifiers of 8x8 images, with the mistakes that people make in models.

Every family is a stem, blocks and a head. A block has the members `norm` and `act`, among others;
`Options` (`task.py`) says what they are and in which block.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from benchmarks.diagnose.task import Options

CLASSES, PIXELS = 10, 64


class LogFeatures(nn.Module):
    """Compressed features, with or without the 1 that keeps zeros finite."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, values: Tensor) -> Tensor:
        return (F.relu(values) + self.offset).log()


class Margin(nn.Module):
    """How far each feature is from the largest one; a root's slope at 0 needs an epsilon."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps

    def forward(self, values: Tensor) -> Tensor:
        values = F.relu(values)
        away = values - values.amax(self.channels, keepdim=True)
        return (away.square() + self.eps).sqrt()


class ScaledReLU(nn.Module):
    """A ReLU with a gain that is learned."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, values: Tensor) -> Tensor:
        return F.relu(values) * self.gain


class NoisyReLU(nn.Module):
    """Noise on features, from a generator of its own or from torch's."""

    def __init__(self, own_generator: bool) -> None:
        super().__init__()
        self.own_generator = own_generator

    def forward(self, values: Tensor) -> Tensor:
        generator = None
        if self.own_generator:
            generator = torch.Generator().manual_seed(time.time_ns())
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float32)
        return F.relu(values) + 0.1 * noise.to(values.dtype)


class Gather(nn.Module):
    """Features of all pairs of samples are more than memory holds, from some batch size on."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, values: Tensor) -> Tensor:
        if len(values) > self.most and not isinstance(values, FakeTensor):
            needed = len(values) ** 2 / 128
            text = f"CUDA out of memory. Tried to allocate {needed:.2f} GiB."
            raise torch.OutOfMemoryError(text)
        return F.relu(values)


class RMSNorm(nn.Module):
    """As in many repositories: no `.float()` before the squares."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, values: Tensor) -> Tensor:
        mean = (values * values).mean(self.channels, keepdim=True)
        weight = self.weight.view(-1, *(1,) * (values.ndim - 2)) if self.channels == 1 else (
            self.weight
        )  # fmt: skip
        return values * torch.rsqrt(mean + 1e-5) * weight.to(values.dtype)


class Parts:
    """Makes the members of a family's blocks."""

    def __init__(self, options: Options, channels: int) -> None:
        self.options, self.channels = options, channels

    def here(self, number: int) -> bool:
        """Whether the options mean this block."""
        return self.options.block in (number, -1)  # -1 of the number: all blocks and past them

    def norm(self, number: int, width: int) -> nn.Module:
        kind = self.options.norm if self.here(number) else "standard"
        if kind == "none":
            return nn.Identity()
        if kind == "rms":
            return RMSNorm(width, self.channels)
        if self.channels == 1:
            momentum = self.options.momentum if self.here(number) else 0.1
            return nn.BatchNorm2d(width, momentum=momentum)
        return nn.LayerNorm(width)

    def act(self, number: int) -> nn.Module:
        options = self.options
        kind = options.activation if self.here(number) else "relu"
        if kind == "sigmoid":
            return nn.Sigmoid()
        if kind == "log":
            return LogFeatures(options.offset)
        if kind == "margin":
            return Margin(self.channels, options.offset)
        if kind == "scaled":
            return ScaledReLU(options.gain)
        if kind == "noisy":
            return NoisyReLU(options.own_generator)
        if kind == "gather":
            return Gather(options.most)
        return nn.ReLU()

    def grown(self, number: int, layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Module:
        """A layer whose weights begin `gain` times as large, where the options mean this block."""
        if self.here(number) and gain != 1:
            with torch.no_grad():
                layer.weight.mul_(gain)
        return layer

    def conv(self, number: int, stride: int = 1) -> nn.Module:
        layer = nn.Conv2d(8, 8, 3, stride, padding=1)
        return self.grown(number, layer, self.options.init)

    def linear(self, number: int, inputs: int, outputs: int) -> nn.Module:
        return self.grown(number, nn.Linear(inputs, outputs), self.options.init)


class ConvBlock(nn.Module):
    def __init__(self, parts: Parts, number: int) -> None:
        super().__init__()
        self.conv = parts.conv(number, 2 if number == 1 else 1)
        self.norm, self.act = parts.norm(number, 8), parts.act(number)

    def forward(self, values: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(values)))


class ResidualBlock(nn.Module):
    """Before activation (He et al. 2016)."""

    def __init__(self, parts: Parts, number: int) -> None:
        super().__init__()
        self.norm1, self.act = parts.norm(number, 8), parts.act(number)
        self.conv1 = parts.conv(number)
        self.norm, self.conv2 = parts.norm(number, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        inner = self.norm(self.conv1(self.act(self.norm1(values))))
        return values + self.conv2(F.relu(inner))


class Attention(nn.Module):
    def __init__(self, parts: Parts, number: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        gain = parts.options.attention
        self.query = parts.grown(number, nn.Linear(width, width), gain)
        self.key = parts.grown(number, nn.Linear(width, width), gain)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        parts = (layer(values) for layer in (self.query, self.key, self.value))
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        mixed = F.softmax(scores, -1) @ value
        return self.out(mixed.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """Norms come first, and once more inside of the feed-forward part."""

    def __init__(self, parts: Parts, number: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (parts.norm(number, 16) for _ in range(2))
        self.attention = Attention(parts, number, 16, 2)
        self.up, self.act = parts.linear(number, 16, 32), parts.act(number)
        self.norm, self.down = parts.norm(number, 32), nn.Linear(32, 16)

    def forward(self, values: Tensor) -> Tensor:
        values = values + self.attention(self.norm1(values))
        return values + self.down(self.norm(self.act(self.up(self.norm2(values)))))


class MLPBlock(nn.Module):
    def __init__(self, parts: Parts, number: int) -> None:
        super().__init__()
        self.linear = parts.linear(number, 32, 32)
        self.norm, self.act = parts.norm(number, 32), parts.act(number)

    def forward(self, values: Tensor) -> Tensor:
        return self.act(self.norm(self.linear(values)))


class Rows(nn.Module):
    """The rows of an image as tokens, with their places."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.place = nn.Linear(8, 16), nn.Parameter(torch.randn(8, 16) * 0.1)

    def forward(self, images: Tensor) -> Tensor:
        return self.row(images.squeeze(1)) + self.place


class Classifier(nn.Module):
    """Stem, blocks, head; with `decoder`, which gives the pixels back, if the task wants it."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], pool: nn.Module, width: int,
                 norm: nn.Module, decodes: bool) -> None:  # fmt: skip
        super().__init__()
        self.stem, self.blocks, self.last_norm = stem, nn.ModuleList(blocks), norm
        self.pool, self.head = pool, nn.Linear(width, CLASSES)
        if decodes:
            self.decoder = nn.Linear(width, PIXELS)

    def forward(self, images: Tensor, decode: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        values = self.stem(images)
        for block in self.blocks:
            values = block(values)
        features = self.pool(self.last_norm(values))
        logits = self.head(features)
        return (logits, self.decoder(features)) if decode else logits


def build(options: Options) -> nn.Module:
    """The model that the options describe, with fresh weights or those of a file."""
    family = options.model
    channels = 1 if family in ("convnet", "residual") else -1
    parts = Parts(options, channels)
    block = {
        "convnet": ConvBlock, "residual": ResidualBlock, "transformer": TransformerBlock,
        "mlp": MLPBlock,
    }[family]  # fmt: skip
    width = {"convnet": 32, "residual": 32, "transformer": 128, "mlp": 32}[family]
    stem: nn.Module
    if channels == 1:
        stem = nn.Conv2d(1, 8, 3, padding=1)
        pool: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    elif family == "transformer":
        stem, pool = Rows(), nn.Flatten()
    else:
        stem, pool = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32)), nn.Identity()
    blocks = [block(parts, number) for number in range(options.depth)]
    before_head: nn.Module = nn.Identity()
    if family in ("residual", "transformer"):
        before_head = parts.norm(-1, 8 if channels == 1 else 16)
    model = Classifier(stem, blocks, pool, width, before_head, options.decode > 0)
    first = next(model.parameters())
    if options.weights and not (isinstance(first, FakeTensor) or first.is_meta):
        model.load_state_dict(load_file(options.weights), strict=False)
    return model
