"""Planned memory beside measured: the peak of a whole training step of engine `local`.

Planned is what `mptrain plan` says. Measured is what torch's CPU allocator handed out and took
back while the model, the engine and a batch were made and two steps were taken, as torch's
profiler recorded it. So both are bytes of tensors, and of what kernels take through the
allocator; the program, the data set and what libraries take by themselves are in neither.

    make bench-memory
    python -m benchmarks.memory --bert     # what BERT needs: planned, of every engine
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mpcli.engines.local import LocalEngine
from mpcli.machine import Machine
from mpcli.plan import make_plan
from mpcli.plan.fake import meta_model
from mpcli.plan.memory import memory_of
from mpcli.plan.precision import fp32_islands
from mpcli.plan.step import run_step
from mpcli.precision.numerics import numeric_settings
from mpcli.recipe.load import load_recipe
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan, Plan
from mpcli.tasks import apply_activation_checkpointing, task_of
from tests.tiny_cifar import write_tiny_cifar

CPU = Machine(cuda_devices=(), emulated={}, unsupported={})
TOLERANCE = 0.15
MIB = 2**20
MODELS = {
    "resnet9": ("cifar10-fp32", "task.model.width=32"),
    "vit": ("cifar10-vit", "task.model.layers=4"),
    "bert-tiny": ("bert-tiny-mlm", "data.sequence_length=64"),
}
BATCHES = (16, 48)
MODES = ("fp32", "bf16", "bf16-master")


@dataclass(frozen=True)
class Cell:
    """A recipe's peak, in bytes."""

    model: str
    mode: str
    batch: int
    planned: MemoryPlan
    measured: int

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was measured."""
        return self.planned.peak / self.measured - 1


def cell(model: str, mode: str, batch: int, *settings: str) -> Cell:
    """Plan a step, and take it."""
    name, *own = MODELS[model]
    loaded = load_recipe(
        Path("recipes") / f"{name}.yaml",
        (
            *own,
            f"precision={{mode: {mode}}}",
            f"train={{steps: 2, global_batch_size: {batch}}}",
            "engine={kind: local, device: cpu}",
            "eval.every=null",
            *settings,
        ),
    )
    plan = make_plan(loaded.recipe, CPU, memory=True)
    assert plan.memory is not None, plan.memory_unknown
    return Cell(model, mode, batch, plan.memory, measured_peak(loaded.recipe, plan))


def measured_peak(recipe: Recipe, plan: Plan) -> int:
    """Bytes that torch's CPU allocator had handed out at once, at most, for two steps."""
    task, device = task_of(recipe.task), torch.device("cpu")
    data = task.load_data(recipe.task, recipe.data)
    loss = partial(task.loss, recipe.task)
    batch_size = recipe.train.global_batch_size
    with (
        numeric_settings(recipe.precision, device),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        model = task.build_model(recipe.task, data.info)
        if recipe.engine.activation_checkpointing:
            apply_activation_checkpointing(model)
        engine = LocalEngine(recipe, model, device, 2, plan.fp32_modules)
        batch = data.example(batch_size)
        for _ in range(2):
            micro_batches = batch.split(plan.micro_batch_size)
            for index, micro_batch in enumerate(micro_batches, 1):
                last = index == len(micro_batches)
                engine.accumulate(loss, micro_batch, batch.weight, last=last)
            engine.step()
    live = peak = 0
    for change in _changes(profiler):
        live += change
        peak = max(peak, live)
    return peak


def _changes(profiler: profile) -> list[int]:
    """Bytes handed out, and taken back, in their order."""
    recorded = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = [event for event in recorded if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def cells() -> Iterator[Cell]:
    """The whole table."""
    for model in MODELS:
        for mode in MODES:
            for batch in BATCHES:
                yield cell(model, mode, batch)


ENGINES = {
    "local": (1, "engine={kind: local, device: cpu}"),
    "ddp": (8, "engine={kind: ddp, device: cpu, processes: 8}"),
    "fsdp2": (8, "engine={kind: fsdp2, device: cpu, processes: 8}"),
    "fsdp2, cpu_offload": (1, "engine={kind: fsdp2, device: cpu, cpu_offload: true}"),
    "deepspeed 2": (8, "engine={kind: deepspeed, device: cpu, stage: 2, processes: 8}"),
    "deepspeed 3": (8, "engine={kind: deepspeed, device: cpu, stage: 3, processes: 8}"),
    "deepspeed 2, offload": (1, "engine={kind: deepspeed, device: cpu, stage: 2, offload: true}"),
}


def bert() -> None:
    """Print what BERT needs on a device, by engine, mode and optimizer."""
    device = torch.device("meta")  # beside a host whose memory is another one
    print("| Model | Optimizer | Mode | Engine | Ranks | Parts | Activations | Peak | Host |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model, optim, mode in itertools.product(
        ("bert-base", "bert-large"), ("adamw", "adamw8bit"), MODES
    ):
        recipes = {}
        for name, (_, engine) in ENGINES.items():
            overrides = (
                f"task.model.name={model}",
                f"precision={{mode: {mode}}}",
                f"optim={{kind: {optim}, lr: 1e-4}}",
                "train={steps: 1, global_batch_size: 16}",
                "data={kind: text, sequence_length: 128}",
                "task.model.values={vocab_size: 30522}",
                engine,
            )
            recipes[name] = load_recipe("recipes/bert-base-mlm.yaml", overrides).recipe
        local = recipes["local"]
        data = task_of(local.task).load_data(local.task, local.data)
        cpu = torch.device("cpu")
        fp32 = fp32_islands(local.precision, meta_model(local, data), cpu, CPU)
        step = run_step(local, data, cpu, 16, fp32)
        for name, (ranks, _) in ENGINES.items():
            if optim == "adamw8bit" and name not in ("local", "ddp"):
                continue  # its state is of whole weights
            if mode == "bf16-master" and name == "ddp":
                continue  # see docs/precision.md
            memory = memory_of(step, recipes[name], data, device, ranks, 1, fp32)
            always = memory.weights + memory.masters + memory.optimizer + memory.gradients
            numbers = (always, memory.activations, memory.peak, memory.host)
            cells = " | ".join(f"{number / 2**30:.2f}" for number in numbers)
            print(f"| {model} | {optim} | {mode} | {name} | {ranks} | {cells} |", flush=True)


def with_data(folder: Path) -> None:
    """Images shaped as CIFAR-10's, where recipes look for them."""
    write_tiny_cifar(folder / "cifar10", num_train=128)
    os.environ["MPTRAIN_DATA"] = str(folder)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bert", action="store_true", help="what BERT needs, in GiB")
    if parser.parse_args().bert:
        bert()
        return
    with tempfile.TemporaryDirectory() as folder:
        with_data(Path(folder))
        print("| Model | Mode | Batch | Planned | at | Measured | Off |")
        print("|---|---|---|---|---|---|---|")
        before: Cell | None = None
        for now in cells():
            difference = ""
            if before and (before.model, before.mode) == (now.model, now.mode):
                planned = now.planned.peak - before.planned.peak
                difference = f"; growth {planned / (now.measured - before.measured) - 1:+.1%}"
            print(
                f"| {now.model} | {now.mode} | {now.batch} | {now.planned.peak / MIB:.1f} MiB "
                f"| {now.planned.peak_at} | {now.measured / MIB:.1f} MiB "
                f"| {now.error:+.1%}{difference} |",
                flush=True,
            )
            before = now


if __name__ == "__main__":
    main()
