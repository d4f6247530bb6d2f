"""A task that is learnt in a few dozen steps, and models that train well or badly by how they are
made."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from mpcli.data import TensorDataset
from mpcli.recipe.plugin import Plugin


class Options(Plugin):
    model: Literal["mlp", "sigmoids", "recurrent", "conv", "residual", "transformer"]
    gain: float = 1.0  # that initial weight matrices are multiplied by
    bias: float = 0.0  # of every input, before the first layer
    momentum: float = 0.1  # of BatchNorm's statistics
    draws: bool = False  # the middle layer adds random numbers that no generator of torch knows


def load_data(options: Options, data: Any) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator)
    splits = []
    for number in (256, 64):
        targets = torch.arange(number) % 4
        inputs = centres[targets] + 0.5 * torch.randn(number, 16, generator=generator)
        splits.append({"inputs": inputs + options.bias, "targets": targets})
    return TensorDataset(*splits, source="four clouds of points")


class Recurrent(nn.Module):
    """The same layer sixteen times: gradients are multiplied by its matrix as often."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.step, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs)
        for _ in range(16):
            hidden = self.step(hidden)
        return self.head(hidden)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.down(F.gelu(self.up(self.norm(values))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(inputs.view(-1, 4, 4))).mean(1))


class Noise(nn.Module):
    """Of a generator of its own, so that no two forwards are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()
        self.generator.seed()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(values.shape).normal_(generator=self.generator)
        return values + 0.01 * noise.to(values)


def build_model(options: Options, info: Any) -> nn.Module:
    def stack(depth: int, activation: type[nn.Module]) -> list[nn.Module]:
        return [module for _ in range(depth) for module in (nn.Linear(16, 16), activation())]

    if options.model == "mlp":
        layers = stack(3, nn.ReLU)
        if options.draws:
            layers[3] = Noise()
        model: nn.Module = nn.Sequential(*layers, nn.Linear(16, 4))
    elif options.model == "sigmoids":
        model = nn.Sequential(*stack(8, nn.Sigmoid), nn.Linear(16, 4))
    elif options.model == "recurrent":
        model = Recurrent()
    elif options.model == "conv":
        model = nn.Sequential(
            nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8, momentum=options.momentum), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8, momentum=options.momentum), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, 4),
        )  # fmt: skip
    elif options.model == "residual":
        model = nn.Sequential(Residual(), Residual(), Residual(), nn.Linear(16, 4))
    else:
        model = Transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= options.gain
    return model


def loss(options: Options, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
    logits = model(batch["inputs"]).float()
    return F.cross_entropy(logits, batch["targets"], reduction="sum"), batch.weight


def evaluate(options: Options, model: nn.Module, batches: Any) -> dict[str, float]:
    total = weight = 0.0
    for batch in batches:
        logits = model(batch["inputs"]).float()
        total += F.cross_entropy(logits, batch["targets"], reduction="sum").item()
        weight += batch.weight
    return {"loss": total / weight}
