"""How many samples a forward may have: as many as the memory holds.

A smaller micro-batch is the same step: gradients add up to those of the same global batch.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterator

import torch

from mpcli.data.batch import micro_batch_sizes
from mpcli.engines.local import LocalEngine
from mpcli.machine import Machine
from mpcli.plan.memory import UnknownMemory, plan_memory
from mpcli.plan.memory_text import parts_text
from mpcli.plan.precision import PrecisionPlan, has_batch_norm
from mpcli.plan.processes import batch_problems, micro_batch_size
from mpcli.precision.numerics import numeric_settings
from mpcli.recipe.engine import Ddp, Local
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan, ModulePrecision, Plan
from mpcli.sizes import size_text
from mpcli.tasks import Dataset, apply_activation_checkpointing, task_of

SHARE = 0.8
"""Of the free memory, that a plan may fill where nothing is tried: the rest is for what it does
not count, such as libraries, fragments and what other programs take later."""


_NO_MEMORY = (
    "can't allocate memory",  # torch's allocator of host memory
    "CUDA error: out of memory",  # a call of CUDA, past torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "'out of memory'",  # NCCL's last error: Cuda failure 2 'out of memory'
)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or a library under it had no memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    )


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()  # a training's functions refer to each other
    torch.cuda.empty_cache()


def fitting(
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    machine: Machine,
    world_size: int,
    nodes: int,
    steps: int,
    precision: PrecisionPlan,
    *,
    training: bool = True,
) -> int:
    """The largest micro-batch for which there is memory: the whole share, a half, a quarter, ...

    On a GPU it is tried. On a CPU allocations do not fail, and a process that uses too much is
    killed: there what the step is planned to need has to fit `SHARE` of what is free. So it does
    where the memory of all processes together is not that of one of them. Of `ddp` both are asked
    of a GPU: what is tried has no buckets.

    Args:
        nodes: machines among which the processes are divided.
        steps: of the run.
        training: whether it is to be trained: to evaluate, the smallest is tried in any case.

    Raises:
        UserError: exit 3, there is no memory for the smallest, or nobody knows how much it needs.
    """
    free = machine.available_memory.get(device.type)
    is_tried = training and device.type == "cuda" and isinstance(recipe.engine, Local | Ddp)
    if free is not None and device.type == "cpu":
        free //= world_size // nodes
    is_whole = is_tried and isinstance(recipe.engine, Local)  # the trial is all of the training
    room = free if free is None or is_whole else int(SHARE * free)
    fp32_modules = precision.fp32_modules
    for size in _candidates(recipe, world_size, precision.modules):
        memory = _memory(recipe, data, device, world_size, size, fp32_modules)
        if memory is None and training and not is_tried:
            raise user_error(
                "how much memory a step needs cannot be planned for this model",
                "name a `micro_batch_size`: what has no memory is tried again with half of it",
                path="train.micro_batch_size",
                exit_code=Exit.ENVIRONMENT,
            )
        if memory and room is not None and memory.peak > room:
            continue
        if not is_tried or trial(recipe, device, world_size, size, steps, fp32_modules):
            return size
    if not training:
        return size
    raise _nothing_fits(size, memory, free, room, device)


def _nothing_fits(
    size: int,
    needed: MemoryPlan | None,
    free: int | None,
    room: int | None,
    device: torch.device,
) -> UserError:
    samples = f"{size} samples" if size > 1 else "1 sample"
    what = f"out of memory: this {device.type} has none for a micro-batch of {samples}"
    if needed:
        what += f" ({parts_text(needed)})"
    hint = None
    if free is not None and room is not None:
        what += f"; {size_text(free)} are free for each process"
        if room < free:
            what += f", of which it may fill {size_text(room)}"
        settings = f"--set train.micro_batch_size={size} --capacity {size_text(room)}"
        hint = f"`mptrain plan` with `{settings}` shows what makes it fit"
    return user_error(what, hint, path="train.micro_batch_size", exit_code=Exit.ENVIRONMENT)


def _memory(
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    world_size: int,
    micro_batch: int,
    fp32_modules: tuple[str, ...],
) -> MemoryPlan | None:
    """Of the process with the largest share; None: nobody knows."""
    batch = recipe.train.global_batch_size
    parts = len(micro_batch_sizes(batch, 0, world_size, micro_batch))
    try:
        return plan_memory(recipe, data, device, world_size, micro_batch, parts, fp32_modules)
    except UnknownMemory:
        return None


def trial(
    recipe: Recipe,
    device: torch.device,
    world_size: int,
    micro_batch: int,
    steps: int,
    fp32_modules: tuple[str, ...],
) -> bool:
    """Whether two steps with such a micro-batch find the memory they need; nothing of them stays.

    Args:
        steps: of the run.
        fp32_modules: see `convert`.
    """
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _two_steps(recipe, device, world_size, micro_batch, steps, fp32_modules)
        fits = True
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fits = False
    release_memory()
    return fits


def _two_steps(
    recipe: Recipe,
    device: torch.device,
    world_size: int,
    micro_batch: int,
    steps: int,
    fp32_modules: tuple[str, ...],
) -> None:
    """The largest share's first micro-batches, as the trainer runs them."""
    train, options, task = recipe.train, recipe.task, task_of(recipe.task)
    with numeric_settings(recipe.precision, device):
        data = task.load_data(options, recipe.data)
        data.prepare(torch.device("cpu") if recipe.engine.data_workers else device)
        model = task.build_model(options, data.info).to(device)
        if recipe.engine.activation_checkpointing:
            apply_activation_checkpointing(model)
        engine = LocalEngine(recipe, model, device, steps, fp32_modules)
        loss = functools.partial(task.loss, options)
        for step in range(2):
            batch = data.train_batch(train.seed, step, train.global_batch_size).to(device)
            parts = batch.share(0, world_size).split(micro_batch)[:2]
            for number, part in enumerate(parts, 1):
                engine.accumulate(loss, part, batch.weight, last=number == len(parts))
            engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _candidates(
    recipe: Recipe, world_size: int, modules: tuple[ModulePrecision, ...]
) -> Iterator[int]:
    size: int | None = micro_batch_size(recipe, world_size)
    while size:
        yield size
        size = _half(recipe, world_size, size, modules)


def _half(
    recipe: Recipe, world_size: int, size: int, modules: tuple[ModulePrecision, ...]
) -> int | None:
    """Half of a micro-batch, or less where not all processes take as many; None: there is none."""
    least = 2 if has_batch_norm(modules) else 1  # of one sample there are no statistics
    batch = recipe.train.global_batch_size
    for half in range(min(size - 1, math.ceil(size / 2)), 0, -1):
        train = recipe.train.model_copy(update={"micro_batch_size": half})
        if any(batch_problems(recipe.model_copy(update={"train": train}), world_size)):
            continue
        ranks = (0, world_size - 1)
        parts = (n for rank in ranks for n in micro_batch_sizes(batch, rank, world_size, half))
        if min(parts) >= least:
            return half
    return None


def smaller(recipe: Recipe, plan: Plan) -> int | None:
    """Half of a plan's micro-batch; None: there is no smaller one."""
    return _half(recipe, plan.world_size, plan.micro_batch_size, plan.modules)


def halved(recipe: Recipe, plan: Plan) -> Plan | None:
    """The same plan with half the micro-batch; None: there is no smaller one."""
    size = smaller(recipe, plan)
    return None if size is None else _with_size(recipe, plan, size)


def as_before(recipe: Recipe, plan: Plan, before: Plan) -> Plan:
    """A plan with the micro-batch of an attempt before, if that had to be smaller.

    Args:
        plan: of the same recipe as `before`.
    """
    alike = (plan.world_size, plan.device) == (before.world_size, before.device)
    if recipe.train.micro_batch_size == "auto" or not alike:
        return plan
    return _with_size(recipe, plan, min(plan.micro_batch_size, before.micro_batch_size))


def _with_size(recipe: Recipe, plan: Plan, size: int) -> Plan:
    parts = micro_batch_sizes(recipe.train.global_batch_size, 0, plan.world_size, size)
    return plan.model_copy(update={"micro_batch_size": size, "accumulation": len(parts)})


def needed(recipe: Recipe, plan: Plan) -> MemoryPlan | None:
    """The memory of a plan that was made without it; None: nobody knows."""
    data, device = task_of(recipe.task).load_data(recipe.task, recipe.data), plan.device
    size = plan.micro_batch_size
    return _memory(recipe, data, torch.device(device), plan.world_size, size, plan.fp32_modules)
