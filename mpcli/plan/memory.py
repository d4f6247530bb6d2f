"""What a rank's memory will hold, engine by engine."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace

import torch

from mpcli.plan.step import Moment, Step, run_step
from mpcli.recipe.engine import Ddp, DeepSpeed, Fsdp2
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan
from mpcli.tasks import Dataset

MIB = 2**20


class UnknownMemory(Exception):
    """The step cannot be run on tensors without memory; the message says why."""


def plan_memory(
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    fp32_modules: Collection[str],
) -> MemoryPlan:
    """Bytes of one rank, by what they are for, and how many there are at once at most.

    A step of engine `local` is run on fake tensors, so that everything in it is counted by itself.
    Other engines follow from it: what they divide, and what they gather for a while.

    Args:
        micro_batch: samples of a forward.
        accumulation: micro-batches of a step.
        fp32_modules: see `convert`.

    Raises:
        UnknownMemory: the model does what tensors without memory cannot.
    """
    # torch logs a traceback of what is raised, and reported, here.
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")
    torch_log.disabled = True
    try:
        step = run_step(recipe, data, device, micro_batch, fp32_modules)
    except Exception as error:  # models are as many as their faults
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnknownMemory(reason) from error
    finally:
        torch_log.disabled = False
    return memory_of(step, recipe, data, device, world_size, accumulation, fp32_modules)


def memory_of(
    step: Step,
    recipe: Recipe,
    data: Dataset,
    device: torch.device,
    world_size: int,
    accumulation: int,
    fp32_modules: Collection[str],
) -> MemoryPlan:
    """Of the recipe's engine, when a step of one process is known; see `plan_memory`."""
    match recipe.engine:
        case Ddp() as engine:
            return _fullest(_ddp(_accumulated(step, accumulation), engine), 0, device)
        case Fsdp2() as engine:
            from mpcli.plan.divided import fsdp2  # late, as in `engines`

            several = accumulation > 1
            divided = fsdp2(step, engine, recipe, data, world_size, several, fp32_modules)
            return _fullest(*divided, device)
        case DeepSpeed() as engine:
            from mpcli.plan.divided import deepspeed  # late, as in `engines`

            divided = deepspeed(step, engine, world_size)
            return _fullest(*divided, device)
        case _:
            return _fullest(_accumulated(step, accumulation), 0, device)


def _fullest(step: Step, host: int, device: torch.device) -> MemoryPlan:
    """Of a CPU the host's memory is the device's."""
    always = step.weights + step.masters + step.optimizer + step.average
    always += step.buffers + step.batch
    moment = max(step.moments, key=lambda moment: moment.total)
    return MemoryPlan(
        weights=step.weights,
        masters=step.masters,
        gradients=step.gradients,
        optimizer=step.optimizer,
        average=step.average,
        buffers=step.buffers,
        batch=step.batch,
        activations=step.activations,
        temporary=moment.half_gradients + moment.rest,
        peak=always + moment.total + (host if device.type == "cpu" else 0),
        peak_at=moment.phase,
        host=host,
    )


def _accumulated(step: Step, accumulation: int) -> Step:
    """From the second micro-batch on there are gradients, to which new ones are added."""
    if accumulation == 1:
        return step
    later = [_with_all_gradients(step, moment) for moment in step.moments]
    return replace(step, moments=step.moments + tuple(later))


def _with_all_gradients(step: Step, moment: Moment) -> Moment:
    fresh = step.largest_gradient if moment.phase == "backward" and step.masters == 0 else 0
    return replace(moment, gradients=step.gradients, rest=moment.rest + fresh)


def _ddp(step: Step, engine: Ddp) -> Step:
    """Gradients lie in buckets, which are there all the time; or beside them.

    A bucket that is rounded for its way is another copy of it. torch's first bucket is smaller.
    """
    if engine.gradient_as_bucket_view:
        moments = [_with_all_gradients(step, moment) for moment in step.moments]
    else:
        moments = [replace(m, rest=m.rest + step.gradients) for m in step.moments]
    sent = 0
    if engine.gradient_compression != "none":
        sent = min(engine.bucket_megabytes * MIB, step.gradients) // 2
    moments = [replace(m, rest=m.rest + sent * (m.phase == "backward")) for m in moments]
    return replace(step, moments=tuple(moments))
