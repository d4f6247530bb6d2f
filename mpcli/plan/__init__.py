"""(Recipe, Machine) -> Plan: everything derived, or every problem at once, before a tensor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mpcli.data.batch import Batch, micro_batch_sizes
from mpcli.engines import clip_problems, mode_problems
from mpcli.machine import Machine
from mpcli.optim import host_reads
from mpcli.plan.dangers import dangers
from mpcli.plan.memory import UnknownMemory, plan_memory
from mpcli.plan.micro_batch import fitting
from mpcli.plan.optim import extra_problems, matrix_problems, optim_problems
from mpcli.plan.precision import PrecisionPlan, plan_precision
from mpcli.plan.processes import ALONE, Group, micro_batch_size, processes
from mpcli.precision.formats import dtype_name
from mpcli.precision.numerics import numerics
from mpcli.recipe.engine import DeepSpeed, Engine, Fsdp2
from mpcli.recipe.errors import Exit, Problem, UserError, one_of
from mpcli.recipe.fields import kinds
from mpcli.recipe.plugin import plugin_error
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan, PlanWarning
from mpcli.tasks import Dataset, task_of

MAX_STEPS = 10_000_000
"""The learning rates of a run stand in one table on the device: 40 MB at this length."""


def make_plan(
    recipe: Recipe,
    machine: Machine,
    *,
    group: Group = ALONE,
    training: bool = True,
    memory: bool = False,
) -> Plan:
    """Derive everything that a run does from its recipe and machine.

    Args:
        group: the processes that something else started already, or how many machines take part.
        training: whether it is to be trained: to evaluate, no training data are needed.
        memory: whether to plan it too, which takes longer than all the rest.

    Raises:
        UserError: with every problem found; each carries the path of the recipe value.
    """
    try:
        return _planned(recipe, machine, group, training=training, with_memory=memory)
    except UserError:
        raise
    except Exception as error:
        if told := plugin_error(error, recipe.task):
            raise told from error
        raise


def _planned(
    recipe: Recipe, machine: Machine, group: Group, *, training: bool, with_memory: bool
) -> Plan:
    problems = list(_machine_problems(recipe, machine))
    if training:
        problems += _mode_problems(recipe)
        problems += _package_problems(recipe)
        problems += optim_problems(recipe, _device(recipe, machine))
    device = _device(recipe, machine)
    task = task_of(recipe.task)
    try:
        data = task.load_data(recipe.task, recipe.data)
    except UserError as error:
        raise UserError(*problems, *error.problems) from error

    batch = recipe.train.global_batch_size
    steps_per_epoch = data.num_train // batch
    steps = recipe.train.steps or steps_per_epoch * (recipe.train.epochs or 0)
    if training:
        problems += _length_problems(recipe, data, steps)

    world_size = 1
    if training:
        world_size, more_problems = processes(recipe, machine, device, group)
        problems += more_problems
    micro_batch = micro_batch_size(recipe, world_size)

    precision: PrecisionPlan | None = None
    try:
        smallest = min(
            part
            for rank in (0, world_size - 1)
            for part in micro_batch_sizes(batch, rank, world_size, micro_batch)
        )
        precision = plan_precision(recipe, data, device, machine, smallest)
        if training:
            problems += matrix_problems(recipe, precision.hidden_matrices)
        if recipe.train.micro_batch_size == "auto" and not problems:
            micro_batch = fitting(
                recipe,
                data,
                device,
                machine,
                world_size,
                group.nodes,
                steps,
                precision,
                training=training,
            )
    except UserError as error:
        problems += error.problems
    warnings = list(dangers(recipe, machine, device, precision, steps, world_size, micro_batch))
    if problems or precision is None:
        raise UserError(*problems, *warnings)

    accumulation = len(micro_batch_sizes(batch, 0, world_size, micro_batch))
    memory, unknown = None, None
    if with_memory:
        try:
            memory = plan_memory(
                recipe, data, device, world_size, micro_batch, accumulation, precision.fp32_modules
            )
        except UnknownMemory as error:
            unknown = str(error)

    return Plan(
        device=device.type,
        world_size=world_size,
        num_train=data.num_train,
        num_eval=data.num_eval,
        data_source=data.source,
        sample=_sample(data.example(1)),
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        micro_batch_size=micro_batch,
        accumulation=accumulation,
        parameters=precision.parameters,
        host_reads=host_reads(recipe.optim, precision.weights)
        + _offload_reads(recipe.engine, precision.weights, accumulation),
        modules=precision.modules,
        fp32_modules=precision.fp32_modules,
        model_sha256=precision.model_sha256,
        memory=memory,
        memory_unknown=unknown,
        warnings=tuple(
            PlanWarning(finding=w.finding, path=w.path, message=w.what, hint=w.hint)
            for w in warnings
        ),
    )


def _offload_reads(engine: Engine, num_weights: int, accumulation: int) -> int:
    """How often the host waits for the device in each step, at most, to step in host memory.

    For the step's loss, norm and overflow, and for each gradient that it takes over: torch waits
    for the copy, and DeepSpeed asks whether it is finite. Of k micro-batches fsdp2 moves the sum
    and DeepSpeed each one's.
    """
    match engine:
        case Fsdp2(cpu_offload=True):
            return 1 + num_weights
        case DeepSpeed(offload=True):
            return 1 + accumulation * num_weights
        case _:
            return 0


def _length_problems(recipe: Recipe, data: Dataset, steps: int) -> Iterator[Problem]:
    batch = recipe.train.global_batch_size
    if not data.num_train:
        yield Problem(
            f"nothing to train on: {data.source}", path="data", exit_code=Exit.ENVIRONMENT
        )
    elif batch > data.num_train:
        yield Problem(
            f"a batch of {batch:,} is larger than the training set ({data.num_train:,})",
            f"use at most {data.num_train}",
            path="train.global_batch_size",
        )
    elif steps > MAX_STEPS:
        length = "steps" if recipe.train.steps else "epochs"
        yield Problem(f"{steps:,} steps; a run has at most {MAX_STEPS:,}", path=f"train.{length}")


def _sample(batch: Batch) -> dict[str, str]:
    """Type and shape of each tensor of one sample, such as `fp32 3x32x32`."""
    return {
        name: " ".join(filter(None, (dtype_name(t.dtype), "x".join(map(str, t.shape[1:])))))
        for name, t in batch.tensors.items()
    }


def _device(recipe: Recipe, machine: Machine) -> torch.device:
    if recipe.engine.device == "auto":
        return torch.device("cuda" if machine.cuda_devices else "cpu")
    return torch.device(recipe.engine.device)


def _mode_problems(recipe: Recipe) -> Iterator[Problem]:
    """Why the engine cannot honour the mode, and which can."""
    meaning = numerics(recipe.precision.mode)
    engines: Mapping[str, Any] = kinds(Recipe.model_fields["engine"])
    able = (
        f"kind: {kind}"
        for kind, engine in engines.items()
        if not mode_problems(engine(kind=kind), meaning)
    )
    for what in mode_problems(recipe.engine, meaning):
        hint = f"use another mode, or {one_of(able)} in `engine` (docs/precision.md)"
        yield Problem(what, hint, path="precision.mode")


def _package_problems(recipe: Recipe) -> Iterator[Problem]:
    """What training needs, and evaluating does not."""
    if isinstance(recipe.engine, DeepSpeed):
        otherwise = (
            "; or without it `engine: {kind: fsdp2, cpu_offload: true}`, where weights and "
            "gradients live in host memory too"
        )
        yield from extra_problems("deepspeed", "engine.kind", otherwise)


def _machine_problems(recipe: Recipe, machine: Machine) -> Iterator[Problem]:
    if recipe.engine.device == "cuda" and not machine.cuda_devices:
        yield Problem(
            "this machine has no CUDA device that torch can use",
            "use `device: auto` or `device: cpu`; `mptrain env` shows what is here",
            path="engine.device",
            exit_code=Exit.ENVIRONMENT,
        )
    device = _device(recipe, machine).type
    meaning = numerics(recipe.precision.mode)
    if meaning.compute_name in machine.unsupported.get(device, frozenset()):
        yield Problem(
            f"{meaning.compute_name} does not run on this machine's {device}",
            "`mptrain env` shows the precisions that do",
            path="precision.mode",
            exit_code=Exit.ENVIRONMENT,
        )
    for what in clip_problems(recipe.engine, recipe.train.clip):
        yield Problem(what, "use `kind: norm`, or `kind: ddp`", path="train.clip.kind")
    if meaning.tf32 and recipe.precision.sensitive_layers:
        yield Problem(
            "TF32 is one switch for the whole process: no layer can be left out",
            "use `mode: fp32`, or remove `sensitive_layers`",
            path="precision.sensitive_layers",
        )
    compiler = "g++" if device == "cpu" else "gcc"
    if recipe.engine.compile and not shutil.which(compiler):
        yield Problem(
            f"torch.compile needs a compiler ({compiler}) on the PATH",
            "install one, or use `compile: false`",
            path="engine.compile",
            exit_code=Exit.ENVIRONMENT,
        )
    for tracker in recipe.output.trackers:  # each is named as its package
        yield from extra_problems(tracker, "output.trackers")
