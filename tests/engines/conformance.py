"""Training a few steps with any engine, in one process or as one of several ranks."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpcli.checkpoint import Part
from mpcli.data.batch import Batch
from mpcli.engines import build_engine
from mpcli.engines.local import LocalEngine
from mpcli.plan.precision import fp32_islands
from mpcli.precision.numerics import numeric_settings
from mpcli.ranks import Ranks
from mpcli.records import LayerRecord, ModuleTypes
from mpcli.tasks import apply_activation_checkpointing
from tests import small
from tests.small import small_recipe

CPU = torch.device("cpu")
STEPS = 8
BATCH = 16


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, hidden: Tensor) -> Tensor:
        inner: Tensor = self.inner(self.norm(hidden))
        return hidden + inner


class SmallNet(nn.Module):
    """Blocks between layers of their own; a vector of one element and three outputs, which two
    ranks cannot divide evenly; and a parameter that does not learn."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.places = nn.Parameter(torch.randn(8, 16) / 7, requires_grad=False)
        self.blocks = nn.Sequential(Block(), Block())
        self.gain = nn.Parameter(torch.ones(1))
        self.between = nn.Linear(16, 16)
        self.after = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)
        if tied:
            self.after.weight = self.between.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs.flatten(1, 2)) + self.places
        hidden = functional.gelu(self.between(self.blocks(hidden))) * self.gain
        logits: Tensor = self.head(self.norm(self.after(hidden)).mean(1))
        return logits


class InPlace(nn.Module):
    """A block that owns nothing itself, whose output is a view that is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.flatten(1, 2)
        for block in self.blocks:
            added = block(hidden)
            added += hidden
            hidden = added
        logits: Tensor = self.head(hidden).mean(1)
        return logits


class Sometimes(nn.Module):
    """A layer that only some micro-batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.sometimes = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.flatten(1)).tanh()
        if inputs.sum() > 0:
            hidden = hidden + self.sometimes(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class Either(nn.Module):
    """Two layers alike, of which a micro-batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(64, 16)
        self.right = nn.Linear(64, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        layer = self.left if inputs.sum() > 0 else self.right
        logits: Tensor = self.head(layer(inputs.flatten(1)).tanh())
        return logits


def make_model(name: str) -> nn.Module:
    """The same weights for the same name."""
    torch.manual_seed(0)
    match name:
        case "net":
            return SmallNet()
        case "tied":
            return SmallNet(tied=True)
        case "unused":
            model = SmallNet()
            model.unused = nn.Linear(4, 4)
            return model
        case "sometimes":
            return Sometimes()
        case "either":
            return Either()
        case "in place":
            return InPlace()
        case "number":
            model = SmallNet()
            model.number = nn.Parameter(torch.ones(()))
            return model
        case "channels last":
            block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
            model = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), block, nn.Flatten(), nn.Linear(256, 3)
            )
            return model.to(memory_format=torch.channels_last)
        case "sequential":
            return nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
                nn.Flatten(),
                nn.Linear(256, 3),
            )
    raise AssertionError(name)


def make_batch(step: int, size: int = BATCH, overflow: bool = False) -> Batch:
    """The global batch of a step; the last sample may overflow fp16."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(size, 1, 8, 8, generator=generator)
    targets = torch.randint(0, 3, (size,), generator=generator)
    if overflow:
        inputs[-1] *= 1e6
    return Batch({"inputs": inputs, "targets": targets})


def sum_of_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    logits = model(batch["inputs"]).float()
    return functional.cross_entropy(logits, batch["targets"], reduction="sum"), batch.weight


@dataclass(frozen=True)
class Case:
    """A run: the recipe's settings, and what is not in a recipe.

    Attributes:
        micro_batch: samples at most.
        overflows: steps in which the last sample, one rank's, overflows fp16.
        start: a checkpoint to go on from.
        sampled: steps that the probe looks at.
    """

    settings: tuple[str, ...] = ()
    model: str = "net"
    batch: int = BATCH
    micro_batch: int = BATCH
    steps: int = STEPS
    overflows: tuple[int, ...] = ()
    sampled: tuple[int, ...] = ()
    start: tuple[dict[str, Tensor], dict[str, Any]] | None = None


@dataclass
class Trained:
    """What became of a case, everything whole.

    Attributes:
        rows: loss, norm of gradients, scale and found_inf of each step.
        weights: exact ones.
        final: what a trained model is saved as.
        logits: of the weights to evaluate.
        names: of the class of each module.
        samples: a number for each sample that this rank trained on, by step.
        before_overflow, after_overflow: checkpoints around a step of `Case.overflows`.
        seen: what the probe saw in sampled steps.
    """

    rows: list[tuple[float, ...]]
    weights: dict[str, Tensor]
    final: dict[str, Tensor]
    checkpoint: tuple[dict[str, Tensor], dict[str, Any]]
    observed: dict[str, ModuleTypes]
    logits: Tensor
    names: dict[str, str]
    samples: list[list[float]]
    before_overflow: dict[str, Tensor] = field(default_factory=dict)
    after_overflow: dict[str, Tensor] = field(default_factory=dict)
    seen: list[LayerRecord] = field(default_factory=list)


def make_engine(case: Case, ranks: Ranks) -> LocalEngine:
    """The engine of a case."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = small_recipe(Path(folder), *case.settings).recipe
    model = make_model(case.model)
    if recipe.engine.activation_checkpointing:
        apply_activation_checkpointing(model)
    islands = fp32_islands(recipe.precision, model, CPU, small.CPU)
    engine = build_engine(recipe, model, CPU, 2 * STEPS, islands, ranks)
    assert isinstance(engine, LocalEngine)
    return engine


def train(ranks: Ranks, case: Case) -> Trained:
    """Run a case, as one of the ranks or alone."""
    engine = make_engine(case, ranks)
    if case.start:
        engine.restore(*case.start)
    with tempfile.TemporaryDirectory() as folder:
        precision = small_recipe(Path(folder), *case.settings).recipe.precision
    rows, samples, seen = [], [], []
    kept: dict[str, dict[str, Tensor]] = {}
    first = engine.scaler.attempted
    with numeric_settings(precision, CPU):
        for step in range(first, first + case.steps):
            batch = make_batch(step, case.batch, step in case.overflows)
            share = batch.share(ranks.rank, ranks.world_size)
            samples.append([share["inputs"][i].sum().item() for i in range(len(share))])
            if step in case.overflows:
                kept["before_overflow"] = whole_checkpoint(engine)[0]
            if step in case.sampled:
                engine.sample()
            parts = share.split(case.micro_batch)
            for number, part in enumerate(parts, 1):
                engine.accumulate(sum_of_losses, part, batch.weight, last=number == len(parts))
            outcome = engine.step()
            if step in case.overflows:
                kept["after_overflow"] = whole_checkpoint(engine)[0]
            if outcome.layers is not None:
                seen += outcome.layers.records(step, 1) or []
            numbers = (outcome.loss, outcome.grad_norm, outcome.scale, outcome.found_inf)
            rows.append(tuple(number.item() for number in numbers))
            if step == first + 1:
                with engine.evaluating() as model:
                    model(batch["inputs"])
        with engine.evaluating() as model:
            logits = model(make_batch(99)["inputs"]).float()
    return Trained(
        rows=rows,
        weights={name: value.clone() for name, value in engine.weights().items()},
        final={name: value.clone() for name, value in engine.state_dict().items()},
        checkpoint=whole_checkpoint(engine),
        observed=engine.observed or {},
        logits=logits,
        names={name: type(module).__name__ for name, module in engine.model.named_modules()},
        samples=samples,
        seen=seen,
        **kept,
    )


def whole_checkpoint(engine: LocalEngine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a reader makes of the checkpoint that all ranks write."""
    tensors, state = engine.checkpoint()
    whole: dict[str, Tensor] = {}
    for parts in engine.ranks.gathered(tensors):
        for name, part in parts.items():
            if not isinstance(part, Part):
                whole.setdefault(name, part.clone())
                continue
            if name not in whole:
                whole[name] = torch.full(part.shape, torch.nan, dtype=part.tensor.dtype)
            begin = part.offsets[0]
            whole[name][begin : begin + len(part.tensor)] = part.tensor
    return whole, state
