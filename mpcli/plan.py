"""(Recipe, Machine) -> Plan: everything derived, or every problem at once, before a tensor."""

from __future__ import annotations

import importlib.util
import logging
import math
import shutil
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from mpcli.data import DatasetInfo, describe
from mpcli.machine import Machine
from mpcli.precision.numerics import Numerics, autocast, numerics
from mpcli.recipe.errors import Exit, Problem, UserError
from mpcli.recipe.precision import NoScale, StaticScale
from mpcli.recipe.recipe import Recipe
from mpcli.records import ModulePrecision, Plan, PlanWarning
from mpcli.tasks import apply_activation_checkpointing, task_module

MAX_STEPS = 10_000_000
"""The learning rates of a run stand in one table on the device: 40 MB at this length."""
LARGE_SCALE = 2.0**24
"""Above this even gradients of 2^-8 leave fp16's range (65504)."""


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """Derive everything that a run does from its recipe and machine.

    Raises:
        UserError: with every problem found; each carries the path of the recipe value.
    """
    problems = list(_machine_problems(recipe, machine))
    device = _device(recipe, machine)
    info: DatasetInfo | None = None
    try:
        info = describe(recipe.data)
    except UserError as error:
        problems += error.problems
    if info is None:
        raise UserError(*problems)

    batch = recipe.train.global_batch_size
    steps_per_epoch = info.num_train // batch
    steps = recipe.train.steps or steps_per_epoch * (recipe.train.epochs or 0)
    if not steps_per_epoch:
        problems.append(
            Problem(
                f"a batch of {batch:,} is larger than the training set ({info.num_train:,})",
                f"use at most {info.num_train}",
                path="train.global_batch_size",
            )
        )
    elif steps > MAX_STEPS:
        length = "steps" if recipe.train.steps else "epochs"
        problems.append(
            Problem(f"{steps:,} steps; a run has at most {MAX_STEPS:,}", path=f"train.{length}")
        )

    modules: tuple[ModulePrecision, ...] = ()
    parameters = 0
    try:
        with FakeTensorMode():
            model = _fake_model(recipe, info, device)
            modules = tuple(_trace(recipe, model, info, device))
            parameters = sum(p.numel() for p in model.parameters())
    except UserError as error:
        problems += error.problems
    warnings = list(_warnings(recipe, machine, device))
    if problems:
        raise UserError(*problems, *warnings)

    micro_batch = _micro_batch_size(recipe)
    return Plan(
        device=device.type,
        world_size=1,
        num_train=info.num_train,
        num_eval=info.num_eval,
        data_source=info.source,
        input_shape=info.input_shape,
        num_classes=info.num_classes,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        micro_batch_size=micro_batch,
        accumulation=math.ceil(batch / micro_batch),
        parameters=parameters,
        modules=modules,
        warnings=tuple(
            PlanWarning(finding=w.finding, path=w.path, message=w.what, hint=w.hint)
            for w in warnings
        ),
    )


def _micro_batch_size(recipe: Recipe) -> int:
    whole = recipe.train.global_batch_size
    return min(recipe.train.micro_batch_size or whole, whole)


def _device(recipe: Recipe, machine: Machine) -> torch.device:
    if recipe.engine.device == "auto":
        return torch.device("cuda" if machine.cuda_devices else "cpu")
    return torch.device(recipe.engine.device)


def _machine_problems(recipe: Recipe, machine: Machine) -> Iterator[Problem]:
    if recipe.engine.device == "cuda" and not machine.cuda_devices:
        yield Problem(
            "this machine has no CUDA device that torch can use",
            "use `device: auto` or `device: cpu`; `mptrain env` shows what is here",
            path="engine.device",
            exit_code=Exit.ENVIRONMENT,
        )
    device = _device(recipe, machine).type
    if recipe.precision.mode in machine.unsupported.get(device, frozenset()):
        yield Problem(
            f"{recipe.precision.mode} does not run on this machine's {device}",
            "`mptrain env` shows the precisions that do",
            path="precision.mode",
            exit_code=Exit.ENVIRONMENT,
        )
    compiler = "g++" if device == "cpu" else "gcc"
    if recipe.engine.compile and not shutil.which(compiler):
        yield Problem(
            f"torch.compile needs a compiler ({compiler}) on the PATH",
            "install one, or use `compile: false`",
            path="engine.compile",
            exit_code=Exit.ENVIRONMENT,
        )
    if recipe.output.tensorboard and not importlib.util.find_spec("tensorboard"):
        yield Problem(
            "the package tensorboard is not installed",
            "pip install 'mptrain[tensorboard]'",
            path="output.tensorboard",
            exit_code=Exit.ENVIRONMENT,
        )


def _fake_model(recipe: Recipe, info: DatasetInfo, device: torch.device) -> nn.Module:
    """The model with tensors that have a shape, a type and a device, but no memory."""
    # Fake tensors of a device that is absent (said already) cannot be made.
    place = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
    # Constructors may read numbers, which meta tensors allow and fake ones do not.
    with unset_fake_temporarily(), torch.device("meta"):
        model = task_module(recipe.task).build_model(recipe.task, info)
    model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=place))
    if recipe.engine.activation_checkpointing:
        apply_activation_checkpointing(model)
    return model


def _trace(
    recipe: Recipe, model: nn.Module, info: DatasetInfo, device: torch.device
) -> Iterator[ModulePrecision]:
    """Run one forward on fake tensors and report what autocast did with each leaf module."""
    meaning = numerics(recipe.precision.mode)
    batch, micro_batch = recipe.train.global_batch_size, _micro_batch_size(recipe)
    smallest = batch % micro_batch or micro_batch
    leaves = {m: name for name, m in model.named_modules() if not list(m.children())}
    computed: dict[nn.Module, torch.dtype] = {}

    def observe(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            computed.setdefault(module, output.dtype)

    # torch logs a traceback of what is raised, and reported, here.
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")
    torch_log.disabled = True
    handles = [module.register_forward_hook(observe) for module in leaves]
    try:
        with autocast(meaning, device), torch.no_grad():
            task_module(recipe.task).check_forward(recipe.task, model, info, smallest)
    finally:
        torch_log.disabled = False
        for handle in handles:
            handle.remove()
    for module, name in leaves.items():
        if module in computed:
            yield _module_precision(name, module, computed[module], meaning)


def _module_precision(
    name: str, module: nn.Module, computed: torch.dtype, meaning: Numerics
) -> ModulePrecision:
    parameters = list(module.parameters(recurse=False))
    stored = dtype_name(parameters[0].dtype) if parameters else "-"
    if meaning.autocast is None:
        why = "everything is fp32"
    elif computed == torch.float32:
        why = "autocast keeps it in fp32"
    elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        why = f"autocast casts its input and weights to {meaning.mode}"
    elif any(buffer.is_floating_point() for buffer in module.buffers(recurse=False)):
        why = "type of its input; running statistics in fp32"
    else:
        why = "type of its input"
    return ModulePrecision(
        name=name,
        type=type(module).__name__,
        parameters=sum(p.numel() for p in parameters),
        stored=stored,
        computed=dtype_name(computed),
        gradient=stored,
        why=why,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a floating-point type: `fp32`, `fp16`, `bf16`."""
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _warning(finding: str | None, path: str, what: str, hint: str) -> Problem:
    return Problem(what, hint, path=path, severity="warning", finding=finding)


def _warnings(recipe: Recipe, machine: Machine, device: torch.device) -> Iterator[Problem]:
    mode, loss_scale = recipe.precision.mode, recipe.precision.loss_scale
    if mode in machine.emulated.get(device.type, frozenset()):
        yield _warning(
            None,
            "precision.mode",
            f"this {device.type} has no {mode} instructions: exact, but slow",
            "`mptrain env` shows how slow",
        )
    if mode == "fp16" and isinstance(loss_scale, NoScale):
        yield _warning(
            "underflow",
            "precision.loss_scale",
            "without a loss scale, gradients of 2^-25 and less become zero in fp16",
            "use `loss_scale: {kind: dynamic}`",
        )
    if mode != "fp16" and not isinstance(loss_scale, NoScale):
        yield _warning(
            None,
            "precision.loss_scale",
            f"{mode} has the range of fp32: a loss scale changes nothing but its rounding",
            "use `loss_scale: {kind: none}`",
        )
    if isinstance(loss_scale, StaticScale) and mode == "fp16":
        if loss_scale.scale > LARGE_SCALE:
            yield _warning(
                "scale-too-high",
                "precision.loss_scale.scale",
                f"a static scale of {loss_scale.scale:g} takes scaled gradients over "
                "65504, fp16's largest number: every step may be skipped",
                "use `loss_scale: {kind: dynamic}`",
            )
        elif loss_scale.scale < 1:
            yield _warning(
                "underflow",
                "precision.loss_scale.scale",
                f"a static scale of {loss_scale.scale:g} makes gradients smaller: "
                "more of them become zero in fp16",
                "use `loss_scale: {kind: dynamic}`",
            )
