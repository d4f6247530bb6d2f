"""Which type each module is stored and computed in, found by one forward on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from mpcli.data.batch import Batch
from mpcli.machine import Machine
from mpcli.optim import hidden_matrices
from mpcli.plan.fake import make_fake, meta_model
from mpcli.precision.convert import convert
from mpcli.precision.numerics import Numerics, autocast, numeric_settings, numerics
from mpcli.precision.observe import LOSS, TypesObserver, types_of
from mpcli.precision.sensitive import (
    lstm_modules,
    matched,
    no_match,
    norm_modules,
    sensitive_modules,
)
from mpcli.recipe.errors import Problem, UserError, user_error
from mpcli.recipe.plugin import plugin_error
from mpcli.recipe.precision import Precision
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.task import ImageClassification, TextTask, TorchvisionModel
from mpcli.records import ModulePrecision, ModuleTypes
from mpcli.tasks import Dataset, task_of
from mpcli.tasks.torchvision_models import has_cifar_stem
from mpcli.tasks.transformers_models import model_sha256

_READS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_FAILURES = (RuntimeError, ValueError, AssertionError)
_NO_VALUES = (
    "`plan` runs `loss` on tensors without values: neither values nor shapes may hang on them"
)

MAX_DIFFERENCES = 5
"""Modules named when a run's types differ from the plan's."""


def has_batch_norm(modules: Iterable[ModulePrecision]) -> bool:
    """Whether what a model computes depends on which samples share a forward."""
    return any("BatchNorm" in row.type for row in modules)


@dataclass(frozen=True)
class PrecisionPlan:
    """Types of every module that has parameters or computes something."""

    modules: tuple[ModulePrecision, ...]
    fp32_modules: tuple[str, ...]
    parameters: int
    weights: int  # tensors that learn
    hidden_matrices: int  # of those, what Muon is for
    half_norms: int  # norm layers that compute in half
    model_sha256: str | None


def plan_precision(
    recipe: Recipe, data: Dataset, device: torch.device, machine: Machine, num_samples: int
) -> PrecisionPlan:
    """Build the model without memory, convert it as the mode says, and see what it does.

    Args:
        num_samples: of the forward that is traced.

    Raises:
        UserError: no such model, or one that cannot learn from the data; sensitive layers that
            match nothing.
    """
    meaning = numerics(recipe.precision.mode)
    model = meta_model(recipe, data)
    parameters = sum(p.numel() for p in model.parameters())
    islands = fp32_islands(recipe.precision, model, device, machine)
    convert(model, meaning, device, islands)
    example = data.example(num_samples)
    with FakeTensorMode() as mode, numeric_settings(recipe.precision, device):
        batch = make_fake(model, example, device, mode)
        observer = _traced(recipe, model, batch, meaning, device)
    _check_softmax(recipe, model, observer)
    _check_that_islands_run(recipe, model, observer, islands)
    _check_products(observer)
    modules = tuple(_rows(model, observer, meaning, islands))
    norms = set(norm_modules(model))
    return PrecisionPlan(
        modules=modules,
        fp32_modules=tuple(islands),
        parameters=parameters,
        weights=sum(p.requires_grad for p in model.parameters()),
        hidden_matrices=len(hidden_matrices(model)),
        half_norms=sum(row.name in norms and row.computed != "fp32" for row in modules),
        model_sha256=model_sha256(model, data.info) if isinstance(recipe.task, TextTask) else None,
    )


def fp32_islands(
    precision: Precision, model: nn.Module, device: torch.device, machine: Machine
) -> dict[str, str]:
    """Name of each module that computes in fp32 among half neighbours -> why."""
    sensitive = sensitive_modules(model, precision.sensitive_layers)
    meaning = numerics(precision.mode)
    if meaning.compute == torch.float32:
        return {}
    islands = {name: f"sensitive layer ({why})" for name, why in sensitive.items()}
    if meaning.masters:
        for name in norm_modules(model):
            islands.setdefault(name, "norms stay in fp32 beside master weights")
    half = meaning.compute_name
    if meaning.autocast and half in machine.broken_lstm.get(device.type, frozenset()):
        for name in lstm_modules(model):
            islands.setdefault(name, f"autocast has no {half} LSTM on this {device.type}")
    return islands


def _traced(
    recipe: Recipe, model: nn.Module, batch: Batch, meaning: Numerics, device: torch.device
) -> TypesObserver:
    # torch logs a traceback of what is raised, and reported, here.
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")
    torch_log.disabled = True
    observer = TypesObserver(model)
    # The models of transformers are as many as their faults; others are ours.
    failures = Exception if isinstance(recipe.task, TextTask) else _FAILURES
    try:
        with observer, autocast(meaning, device), torch.no_grad():
            task_of(recipe.task).loss(recipe.task, model, batch)
    except failures as error:
        reads_values = isinstance(error, _READS_VALUES)
        if told := plugin_error(error, recipe.task, _NO_VALUES if reads_values else None):
            raise told from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _cannot_learn(recipe, batch, reason) from error
    finally:
        torch_log.disabled = False
    return observer


def _cannot_learn(recipe: Recipe, batch: Batch, reason: str) -> UserError:
    """What a forward that fails on fake tensors means."""
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in batch.tensors.items())
    if "more than 1 value per channel" in reason:  # BatchNorm
        return user_error(
            f"this model cannot learn from {len(batch)} sample at a time ({shapes}): "
            "BatchNorm needs more than one value per channel",
            "let no micro-batch hold a single sample",
            path="train.micro_batch_size",
        )
    what = f"this model cannot learn from a batch of {shapes}: {reason}"
    hint = None
    if isinstance(recipe.task, ImageClassification):
        hint = "choose a model made for small images, such as `smallnet` or `resnet9`"
        model = recipe.task.model
        if isinstance(model, TorchvisionModel) and model.stem == "imagenet":
            hint += ", or set `stem: cifar`" if has_cifar_stem(model.name) else ""
    return user_error(what, hint, path="task.model")


def _rows(
    model: nn.Module, observer: TypesObserver, meaning: Numerics, islands: Mapping[str, str]
) -> Iterator[ModulePrecision]:
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        computed = observer.computed.get(name, "-")
        if not own and computed == "-":
            continue
        stored = types_of(own)
        yield ModulePrecision(
            name=name,
            type=type(module).__name__,
            parameters=sum(p.numel() for p in own),
            stored=stored,
            computed=computed,
            gradient=stored,
            master="fp32" if own and (meaning.masters or meaning.autocast) else "-",
            why=_why(name, module, observer, meaning, islands),
        )
    yield ModulePrecision(
        name=LOSS,
        type="loss",
        parameters=0,
        stored="-",
        computed=observer.computed.get(LOSS, "-"),
        gradient="-",
        master="-",
        why="losses are computed and summed in fp32 in every mode",
    )


def _why(
    name: str,
    module: nn.Module,
    observer: TypesObserver,
    meaning: Numerics,
    islands: Mapping[str, str],
) -> str:
    if name in islands:
        return islands[name]
    if meaning.compute == torch.float32:
        return "fp32, products rounded to TF32" if meaning.tf32 else "everything is fp32"
    computed, half = observer.computed.get(name, "-"), meaning.compute_name
    if name in observer.fused_attention_in:
        return f"attention fused in {half}: its softmax is fp32 inside"
    if computed == "-":
        return "its parent computes with its weights" if name else "its own forward uses them"
    if list(module.parameters(recurse=False)) and meaning.half_weights:
        return f"{half} copy of the master weights" if meaning.masters else f"everything is {half}"
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return f"autocast casts its input and weights to {half}"
    if computed == "fp32":
        return "fp32 by autocast, or by its input"
    if "+" in computed:
        return f"autocast: products in {half}, what needs range in fp32"
    if any(buffer.is_floating_point() for buffer in module.buffers(recurse=False)):
        return "type of its input; running statistics in fp32"
    return "type of its input" if name else "type of what its layers return"


def _check_softmax(recipe: Recipe, model: nn.Module, observer: TypesObserver) -> None:
    """The group `softmax` reaches calls outside modules too, which only the forward shows."""
    patterns = recipe.precision.sensitive_layers
    if "softmax" in patterns and not observer.softmax_in and not matched(model, "softmax"):
        raise UserError(no_match(model, "softmax", patterns.index("softmax")))


def _check_that_islands_run(
    recipe: Recipe, model: nn.Module, observer: TypesObserver, islands: Mapping[str, str]
) -> None:
    """A module whose parent computes with its weights cannot be an island without its parent."""
    problems = []
    for index, pattern in enumerate(recipe.precision.sensitive_layers):
        for name in matched(model, pattern) if islands else ():
            parent = name.rpartition(".")[0]
            owns = any(True for _ in model.get_submodule(name).parameters(recurse=False))
            runs = name in observer.computed or parent not in observer.computed
            if owns and not runs and parent not in islands:
                what = f"`{name}` does not run: `{parent or 'the model'}` computes with its weights"
                hint = f"list `{parent or '*'}`, or its class"
                path = f"precision.sensitive_layers.{index}"
                problems.append(Problem(what, hint, path=path))
                break
    if problems:
        raise UserError(*problems)


def _check_products(observer: TypesObserver) -> None:
    """A product of two types fails when it runs: a weight of one module used in another."""
    for name in sorted(observer.mixed_products_in)[:1]:
        raise UserError(
            Problem(
                f"`{name or '(model)'}` multiplies tensors of different types",
                "list it, or the module whose weights it uses, in `sensitive_layers`; or choose "
                "`mode: fp16` or `bf16`, which cast every product",
                path="precision.mode",
            )
        )


def type_differences(
    planned: tuple[ModulePrecision, ...], observed: Mapping[str, ModuleTypes]
) -> Iterator[Problem]:
    """Warnings where a run's modules had other types than planned."""
    differences = [
        f"`{row.name or '(model)'}` {what} {was}, planned {expected}"
        for row in planned
        if row.name in observed
        for what, was, expected in (
            ("stored", observed[row.name].stored, row.stored),
            ("computed in", observed[row.name].computed, row.computed),
            ("had gradients in", observed[row.name].gradient, row.gradient),
        )
        if was != expected and was != "-"
    ]
    more = len(differences) - MAX_DIFFERENCES
    for difference in differences[:MAX_DIFFERENCES]:
        yield _difference(difference)
    if more > 0:
        yield _difference(f"{more} more modules differ from the plan")


def _difference(what: str) -> Problem:
    hint = "`observed.json` of the attempt holds every module's types, `plan.json` what was planned"
    return Problem(what, hint, path="precision.mode", severity="warning")
