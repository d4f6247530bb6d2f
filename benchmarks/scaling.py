"""What several processes gain and cost: efficiency, overhead of the engines, bytes on the wire.

One job, compute-bound: a ResNet-9 on images of 32x32, of random pixels, in fp32 with SGD. Every
process has one thread and one core of its own, and every number is a ratio of two kinds of steps
that one run takes in turn, so that a machine whose speed drifts does not count:

- efficiency: steps of one process on one core over steps of two processes on two cores, for the
  same global batch, over 2. It also says what two cores do to each other (caches, memory): twice
  the same work, one process each and nothing sent, beside one process alone.
- overhead: steps of an engine with one process over those of `local`.
- bytes: what a process writes to its sockets in a step (`wchar` of /proc/self/io) beside what
  the collectives have to send in theory.

    make bench-scaling
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from mpcli import ranks
from mpcli.data.batch import Batch
from mpcli.data.images import ImageInfo
from mpcli.engines import build_engine
from mpcli.engines.base import Engine
from mpcli.recipe.load import load_recipe
from mpcli.tasks import task_of

CPU = torch.device("cpu")
RECIPE = """\
name: scaling
task: {{kind: image-classification, model: {{kind: resnet9, width: {width}}}}}
data: {{kind: cifar10}}
precision: {{mode: fp32}}
optim: {{kind: sgd, lr: 0.01, momentum: 0.9}}
train: {{steps: 1000000, global_batch_size: {batch}}}
engine: {engine}
"""
ENGINES = {
    "local": "{kind: local, device: cpu}",
    "ddp": "{kind: ddp, device: cpu}",
    "ddp, bf16 sums": "{kind: ddp, device: cpu, gradient_compression: bf16}",
    "fsdp2": "{kind: fsdp2, device: cpu}",
    "fsdp2, not resharded": "{kind: fsdp2, device: cpu, reshard_after_forward: false}",
}


class Job:
    """The training of one engine in one process, a number of steps at a time."""

    def __init__(self, engine: str, width: int, batch: int, group: ranks.Ranks) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(RECIPE.format(width=width, batch=batch, engine=ENGINES[engine]))
            file.flush()
            recipe = load_recipe(Path(file.name)).recipe
        task = task_of(recipe.task)
        torch.manual_seed(0)
        model = task.build_model(recipe.task, ImageInfo(50_000, 10_000, (3, 32, 32), 10, ""))
        blocks = [m for m in model.children() if isinstance(m, nn.Sequential)]
        self.parameters = sum(p.numel() for p in model.parameters())
        self.in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
        self.engine: Engine = build_engine(recipe, model, CPU, 1_000_000, (), group)
        self.loss = functools.partial(task.loss, recipe.task)
        whole = Batch(
            {"inputs": torch.randn(batch, 3, 32, 32), "targets": torch.arange(batch) % 10}
        )
        self.batch, self.weight = whole.share(group.rank, group.world_size), batch

    def steps(self, number: int) -> None:
        """Take steps."""
        for _ in range(number):
            self.engine.accumulate(self.loss, self.batch, self.weight, last=True)
            self.engine.step()


def seconds(call: Callable[[], None]) -> float:
    """Wall time."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def written() -> int:
    """Bytes that this process handed to the kernel so far, in files and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def begin(rank: int, world_size: int, port: int) -> ranks.Ranks:
    """One thread on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    position = ranks.Position(rank, world_size, rank, "localhost", port, "benchmark")
    return ranks.join(position, CPU, 600)


def one_process(rank: int, port: int, options: argparse.Namespace) -> None:
    """Overhead of each engine over `local`, with one process."""
    group = begin(rank, 1, port)
    jobs = {name: Job(name, options.width, options.batch, group) for name in ENGINES}
    ratios: dict[str, list[float]] = {name: [] for name in ENGINES if name != "local"}
    for job in jobs.values():
        job.steps(2)
    for _ in range(options.rounds):
        for name in ratios:
            local = seconds(lambda: jobs["local"].steps(options.steps))
            engine = seconds(lambda job=jobs[name]: job.steps(options.steps))
            ratios[name].append(engine / local - 1)
    tell(options, "overhead", {name: quartiles(found) for name, found in ratios.items()})
    ranks.leave()


def two_processes(rank: int, port: int, options: argparse.Namespace) -> None:
    """Efficiency, and bytes in a step."""
    group = begin(rank, 2, port)
    alone = Job("local", options.width, options.batch, ranks.ALONE)
    beside = Job("local", options.width, options.batch // 2, ranks.ALONE)
    jobs = {
        name: Job(name, options.width, options.batch, group) for name in ENGINES if name != "local"
    }
    efficiency: dict[str, list[float]] = {name: [] for name in ("nothing sent", *jobs)}
    sent = {}
    for job in (alone, beside, *jobs.values()):
        job.steps(2)
    for name, job in jobs.items():
        group.barrier()
        before = written()
        job.steps(4)
        sent[name] = (written() - before) / 4
        group.barrier()
    for _ in range(options.rounds):
        for name, found in efficiency.items():
            if rank == 0:
                one = seconds(lambda: alone.steps(options.steps))
            group.barrier()  # the other one sleeps in it meanwhile
            both = jobs.get(name, beside)
            two = seconds(lambda job=both: (job.steps(options.steps), group.barrier()))
            if rank == 0:
                found.append(one / two / 2)
    if rank == 0:
        tell(options, "efficiency", {name: quartiles(found) for name, found in efficiency.items()})
        job = next(iter(jobs.values()))
        tell(options, "bytes", {name: [sent[name], theory(name, job)] for name in jobs})
    ranks.leave()


def theory(engine: str, job: Job) -> float:
    """Bytes that a rank of two sends in a step, at least: (N - 1) / N of what goes round a ring.

    An all-reduce is a reduce-scatter and an all-gather (Patarasuk & Yuan 2009). FSDP gathers the
    weights for forward, those of the blocks once more for backward if they were freed in between,
    and scatters the sums of gradients.
    """
    whole, blocks = 4 * job.parameters / 2, 4 * job.in_blocks / 2
    return {
        "ddp": 2 * whole,
        "ddp, bf16 sums": whole,
        "fsdp2": 2 * whole + blocks,
        "fsdp2, not resharded": 2 * whole,
    }[engine]


def quartiles(values: list[float]) -> list[float]:
    """Lower, median, upper."""
    return statistics.quantiles(values, n=4, method="inclusive")


def tell(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Leave it for the parent."""
    Path(options.folder, f"{name}.json").write_text(json.dumps(found))


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="of each kind in a round")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--folder", default="build/scaling")
    options = parser.parse_args()
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    for work, number in ((one_process, 1), (two_processes, 2)):
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        multiprocessing.spawn(work, (store.port, options), nprocs=number)
    found = {
        name: json.loads(Path(options.folder, f"{name}.json").read_text())
        for name in ("overhead", "efficiency", "bytes")
    }
    print(f"\n{'one process':24} {'overhead over local (quartiles)':>34}")
    for name, (low, median, high) in found["overhead"].items():
        print(f"{name:24} {median:12.1%}  ({low:.1%} to {high:.1%})")
    print(f"\n{'two processes':24} {'efficiency (quartiles)':>34}")
    for name, (low, median, high) in found["efficiency"].items():
        print(f"{name:24} {median:12.1%}  ({low:.1%} to {high:.1%})")
    print(f"\n{'bytes in a step':24} {'sent':>12} {'theory':>12}")
    for name, (sent, least) in found["bytes"].items():
        print(f"{name:24} {sent:12,.0f} {least:12,.0f}  {sent / least:.3f}")


if __name__ == "__main__":
    main()
