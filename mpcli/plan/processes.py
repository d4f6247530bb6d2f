"""How many processes train, and what each of them has to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mpcli.data.batch import micro_batch_sizes
from mpcli.machine import Machine
from mpcli.recipe.engine import Ddp, DeepSpeed, Fsdp2, Local
from mpcli.recipe.errors import Exit, Problem
from mpcli.recipe.recipe import Recipe


@dataclass(frozen=True)
class Group:
    """Where processes come from.

    Attributes:
        world_size: of the group in which torchrun or SLURM started this process; None: there is
            none, and processes are still to be started.
        nodes: machines that each start `engine.processes`.
    """

    world_size: int | None = None
    nodes: int = 1


ALONE = Group()


def processes(
    recipe: Recipe, machine: Machine, device: torch.device, group: Group
) -> tuple[int, list[Problem]]:
    """How many train together, and why that cannot be."""
    engine = recipe.engine
    if isinstance(engine, Local):
        return 1, list(_local_problems(group))
    gpus = max(1, len(machine.cuda_devices)) if device.type == "cuda" else 1
    each = gpus if engine.processes == "auto" else engine.processes
    world_size = group.world_size or each * group.nodes
    return world_size, [
        *_group_problems(engine, group),
        *_device_problems(engine, machine, device, world_size // group.nodes),
        *batch_problems(recipe, world_size),
    ]


def micro_batch_size(recipe: Recipe, world_size: int) -> int:
    """The most samples of one forward: of a process's whole share, or as the recipe says."""
    share = math.ceil(recipe.train.global_batch_size / world_size)
    size = recipe.train.micro_batch_size
    return min(size, share) if isinstance(size, int) else share


def _local_problems(group: Group) -> Iterator[Problem]:
    if (group.world_size or group.nodes) > 1:
        many = f"{group.world_size} were started" if group.world_size else "`--nodes` asks for more"
        yield Problem(
            f"engine `local` is one process, and {many}",
            "use `kind: ddp`, or `kind: fsdp2`",
            path="engine.kind",
        )


def _group_problems(engine: Ddp | Fsdp2 | DeepSpeed, group: Group) -> Iterator[Problem]:
    if group.world_size is None or engine.processes == "auto":
        return
    wanted = engine.processes * group.nodes
    if wanted != group.world_size:
        machines = f" on each of {group.nodes} machines" if group.nodes > 1 else ""
        yield Problem(
            f"the recipe has {engine.processes}{machines}, and {group.world_size} were started",
            f"use `processes: auto`, or start {wanted}",
            path="engine.processes",
        )


def _device_problems(
    engine: Ddp | Fsdp2 | DeepSpeed, machine: Machine, device: torch.device, each: int
) -> Iterator[Problem]:
    """What this machine lacks for `each` processes."""
    if device.type == "cuda" and not dist.is_nccl_available():
        yield Problem(
            "this torch has no NCCL, over which processes on GPUs talk",
            "install a build of torch that has it, or use `kind: local` or `device: cpu`",
            path="engine.kind",
            exit_code=Exit.ENVIRONMENT,
        )
    visible = len(machine.cuda_devices)
    if device.type == "cuda" and 0 < visible < each:  # without any, that is a problem of its own
        yield Problem(
            f"{each} processes on a machine, and torch sees {visible} "
            f"{'GPU' if visible == 1 else 'GPUs'} of this one",
            "use `processes: auto`, and let every process see all GPUs of its machine; "
            "`mptrain env` shows what is here",
            path="engine.processes",
            exit_code=Exit.ENVIRONMENT,
        )
    if isinstance(engine, Ddp) and engine.sync_batch_norm and device.type == "cpu":
        yield Problem(
            "torch's SyncBatchNorm runs on GPUs only",
            "use `sync_batch_norm: false`",
            path="engine.sync_batch_norm",
        )


def batch_problems(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    """Why a global batch cannot be divided: every process has to take as many micro-batches."""
    batch = recipe.train.global_batch_size
    if batch < world_size:
        yield Problem(
            f"a batch of {batch} cannot be divided among {world_size} processes",
            f"use `global_batch_size: {world_size}` or more, or fewer processes",
            path="train.global_batch_size",
        )
        return
    size = micro_batch_size(recipe, world_size)
    first, last = (micro_batch_sizes(batch, rank, world_size, size) for rank in (0, world_size - 1))
    engine = recipe.engine
    if isinstance(engine, Ddp) and engine.static_graph and len(first) > 1:
        yield Problem(
            "DistributedDataParallel cannot accumulate gradients with a static graph",
            "use `static_graph: false`, or a larger `train.micro_batch_size`",
            path="engine.static_graph",
        )
    if len(first) != len(last):
        # A share and a share of one more differ in micro-batches where a size divides the smaller.
        smaller = next((n for n in range(size - 1, 1, -1) if sum(last) % n), None)
        whole = f"`global_batch_size: {batch - batch % world_size}`"
        yield Problem(
            f"{world_size} processes have {sum(first)} or {sum(last)} samples of a batch of "
            f"{batch}: that is {len(first)} or {len(last)} micro-batches, and all need as many",
            f"use `micro_batch_size: {smaller}`, or {whole}" if smaller else f"use {whole}",
            path="train.micro_batch_size",
        )
