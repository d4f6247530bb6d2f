"""One training step on tensors without memory, and what of it was where."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mpcli.data.batch import Batch
from mpcli.engines.local import LocalEngine
from mpcli.optim import state_bytes, weights_apart
from mpcli.optim.host_read import HostRead
from mpcli.plan.fake import make_fake, meta_model
from mpcli.plan.live import LiveStorages
from mpcli.precision.numerics import numeric_settings
from mpcli.recipe.optim import AdamW8bit, Sgd
from mpcli.recipe.recipe import Recipe
from mpcli.tasks import Dataset, task_of

Phase = Literal["forward", "backward", "update"]


@dataclass(frozen=True)
class Moment:
    """Bytes at a moment of a step, beside those that are there all the time.

    Attributes:
        gradients: those that the optimizer gets.
        half_gradients: of half weights that have masters, before they are added to the masters'.
        rest: what comes and goes, such as the gradients of activations.
    """

    phase: Phase
    gradients: int
    half_gradients: int
    activations: int
    rest: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.half_gradients + self.activations + self.rest

    @property
    def others(self) -> int:
        """What is no gradient."""
        return self.activations + self.rest


@dataclass(frozen=True)
class Step:
    """Bytes in a step of one process: parts, and the fullest moments.

    Attributes:
        largest_gradient: of a single parameter, as backward makes it.
        moments: of each phase the fullest, and the fullest without its gradients.
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    average: int
    buffers: int
    batch: int
    activations: int
    largest_gradient: int
    moments: tuple[Moment, ...]


def run_step(
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    micro_batch: int,
    fp32_modules: Collection[str],
) -> Step:
    """Run a step of one process and one micro-batch on fake tensors."""
    task, model = task_of(recipe.task), meta_model(recipe, data)
    sample, example = data.example(1), data.example(micro_batch)
    seen = _Seen()

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        result = task.loss(recipe.task, model, batch)
        seen.activations = storages.alive() - seen.always
        seen.backward = len(storages.events)
        return result

    def note_gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            seen.made |= storages.numbers([parameter.grad])

    with (
        FakeTensorMode(allow_fallback_kernels=False) as mode,  # they would take real memory
        numeric_settings(recipe.precision, device),
        LiveStorages() as storages,
    ):
        batch = make_fake(model, example, device, mode)
        storages.numbers(batch.tensors.values())
        # Packages that step 8-bit states know no fake tensors. They step in place.
        in_8bit = isinstance(recipe.optim, AdamW8bit)
        built = _with_plain_sgd(recipe) if in_8bit else recipe
        engine = LocalEngine(built, model, device, 1, fp32_modules)
        named = list(zip(engine.names, engine.masters, strict=True))
        apart = weights_apart(recipe.optim, model)
        weights = storages.numbers(model.parameters())
        masters = storages.numbers([*engine.masters, *engine.frozen.values()]) - weights
        states = storages.numbers(_tensors(engine.optimizer))
        average = storages.numbers(engine.average)
        buffers = storages.numbers([*engine.buffers, *engine.buffers_before])
        for parameter in engine.parameters:
            parameter.register_post_accumulate_grad_hook(note_gradient)
        seen.always = storages.alive()
        seen.forward = len(storages.events)
        engine.accumulate(loss, batch, batch.weight, last=True)
        seen.update = len(storages.events)
        seen.gradients = storages.numbers(m.grad for m in engine.masters if m.grad is not None)
        engine.step()

    total = storages.bytes_of
    return Step(
        weights=total(weights),
        masters=total(masters),
        gradients=total(seen.gradients),
        optimizer=state_bytes(recipe.optim, named, apart) if in_8bit else total(states),
        average=total(average),
        buffers=total(buffers),
        batch=recipe.train.global_batch_size * sum(t.nbytes for t in sample.tensors.values()),
        activations=total(seen.activations),
        largest_gradient=max((storages.sizes[number] for number in seen.made), default=0),
        moments=tuple(_moments(storages, seen)),
    )


@dataclass
class _Seen:
    """Storages by what they are for, and the events that phases begin at."""

    always: set[int] = field(default_factory=set)
    activations: set[int] = field(default_factory=set)
    gradients: set[int] = field(default_factory=set)
    made: set[int] = field(default_factory=set)  # gradients as backward makes them
    forward: int = 0
    backward: int = 0
    update: int = 0


def _with_plain_sgd(recipe: Recipe) -> Recipe:
    plain = Sgd(kind="sgd", lr=recipe.optim.lr, momentum=0.0)
    return recipe.model_copy(update={"optim": plain})


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from state.values()
    if isinstance(optimizer, HostRead):
        yield from optimizer.tables


def _moments(storages: LiveStorages, seen: _Seen) -> Iterator[Moment]:
    """Of each phase the fullest moment, and the fullest without its gradients."""
    sizes = storages.sizes
    half = seen.made - seen.gradients
    now = {"gradients": 0, "half_gradients": 0, "activations": 0, "rest": 0}
    phases: list[tuple[Phase, int, int]] = [
        ("forward", seen.forward, seen.backward),
        ("backward", seen.backward, seen.update),
        ("update", seen.update, len(storages.events)),
    ]
    for phase, start, end in phases:
        moments = [Moment(phase, **now)]
        for event in storages.events[start:end]:
            number, sign = (event, 1) if event >= 0 else (-1 - event, -1)
            if number in seen.always:
                continue
            part = "rest"
            if number in seen.gradients:
                part = "gradients"
            elif number in half:
                part = "half_gradients"
            elif number in seen.activations:
                part = "activations"
            now[part] += sign * sizes[number]
            if sign > 0:
                moments.append(Moment(phase, **now))
        yield max(moments, key=lambda moment: moment.total)
        yield max(moments, key=lambda moment: moment.others)
