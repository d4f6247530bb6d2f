"""Planned memory beside measured: the peak of a whole training step.

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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mpcli.engines import build_engine, mode_problems
from mpcli.machine import Machine
from mpcli.optim import state_bytes, weights_apart
from mpcli.plan import make_plan
from mpcli.plan.fake import meta_model
from mpcli.plan.memory import memory_of
from mpcli.plan.optim import optim_problems
from mpcli.plan.precision import fp32_islands
from mpcli.plan.step import Step, run_step
from mpcli.precision.numerics import numeric_settings, numerics
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.load import load_recipe
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan, Plan
from mpcli.tasks import Dataset, apply_activation_checkpointing, task_of
from tests.ranks import Group, ranks_of
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


def cell(model: str, mode: str, batch: int, *settings: str, pair: Group | None = None) -> Cell:
    """Plan a step, and take it; in two processes if there is a `pair` of them."""
    name, *own = MODELS[model]
    loaded = load_recipe(
        Path("recipes") / f"{name}.yaml",
        (
            *own,
            f"precision={{mode: {mode}}}",
            f"train={{steps: 2, global_batch_size: {batch}}}",
            "eval.every=null",
            *(settings or ("engine={kind: local, device: cpu}",)),
        ),
    )
    plan = make_plan(loaded.recipe, CPU, memory=True)
    assert plan.memory is not None, plan.memory_unknown
    if pair is None:
        return Cell(model, mode, batch, plan.memory, measured_peak(ALONE, loaded.recipe, plan))
    measured = max(pair.run(measured_peak, loaded.recipe, plan))
    return Cell(model, mode, batch, plan.memory, measured)


def measured_peak(ranks: Ranks, recipe: Recipe, plan: Plan) -> int:
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
        engine = build_engine(recipe, model, device, 2, plan.fp32_modules, ranks)
        batch = data.example(batch_size)
        for _ in range(2):
            share = batch.share(ranks.rank, ranks.world_size)
            micro_batches = share.split(plan.micro_batch_size)
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
    """The whole table of engine `local`."""
    for model in MODELS:
        for mode in MODES:
            for batch in BATCHES:
                yield cell(model, mode, batch)


DIVIDED = {
    "ddp": "engine={kind: ddp, device: cpu, processes: 2}",
    "fsdp2": "engine={kind: fsdp2, device: cpu, processes: 2}",
    "fsdp2, cpu_offload": "engine={kind: fsdp2, device: cpu, processes: 2, cpu_offload: true}",
}


def divided_cells(pair: Group) -> Iterator[tuple[str, Cell]]:
    """Of two processes, with the engine of each; the batch is of both together."""
    for engine, setting in DIVIDED.items():
        for mode in ("fp32", "bf16-master") if engine == "fsdp2" else ("fp32",):
            for batch in BATCHES:
                yield engine, cell("vit", mode, 2 * batch, setting, pair=pair)


ENGINES = {
    "local": (1, "engine={kind: local, device: cpu%s}"),
    "ddp": (8, "engine={kind: ddp, device: cpu, processes: 8%s}"),
    "fsdp2": (8, "engine={kind: fsdp2, device: cpu, processes: 8%s}"),
    "fsdp2, cpu_offload": (1, "engine={kind: fsdp2, device: cpu, cpu_offload: true%s}"),
    "deepspeed 2": (8, "engine={kind: deepspeed, device: cpu, stage: 2, processes: 8%s}"),
    "deepspeed 3": (8, "engine={kind: deepspeed, device: cpu, stage: 3, processes: 8%s}"),
    "deepspeed 2, offload": (1, "engine={kind: deepspeed, device: cpu, offload: true%s}"),
}
FEW, MANY = 16, 64  # samples
DEVICES = (8, 16, 24, 80)  # GiB
RESERVED = 1.0
"""GiB of a device, assumed and not measured, that CUDA's context and workspaces take."""
GIB = 2**30


@dataclass(frozen=True)
class Bert:
    """Steps of one process, of few and of many samples: from both follow those of any number."""

    few: Step
    many: Step
    recipes: dict[str, Recipe]  # by engine
    data: Dataset
    fp32_modules: Collection[str]

    def memory(self, engine: str, step: Step, accumulation: int) -> MemoryPlan:
        """On a device beside a host with memory of its own."""
        ranks, recipe = ENGINES[engine][0], self.recipes[engine]
        device = torch.device("meta")
        return memory_of(step, recipe, self.data, device, ranks, accumulation, self.fp32_modules)

    def largest(self, engine: str, rooms: Sequence[float]) -> list[str]:
        """For each room, in GiB, the largest power of two of samples of one of many micro-batches.

        Peaks are on the line through both steps', and at least what is always there.
        """
        few, many = (self.memory(engine, step, 2) for step in (self.few, self.many))
        each = (many.peak - few.peak) / (MANY - FEW)
        peaks = {2**n: max(few.peak + each * (2**n - FEW), always(few)) for n in range(16)}
        fitting = ([size for size, peak in peaks.items() if peak <= r * GIB] for r in rooms)
        return [f"{max(sizes):,}" if sizes else "-" for sizes in fitting]


def always(memory: MemoryPlan) -> int:
    """Bytes on the device that do not depend on the batch."""
    return memory.weights + memory.masters + memory.optimizer + memory.gradients


def bert(model: str, mode: str, *, checkpointing: bool) -> dict[str, Bert]:
    """Run the steps on tensors without memory; what follows, by optimizer.

    Both optimizers step in place: their steps differ in the state alone.
    """
    cpu = torch.device("cpu")
    recipes: dict[str, dict[str, Recipe]] = {"adamw": {}, "adamw8bit": {}}
    for optim, (name, (_, engine)) in itertools.product(recipes, ENGINES.items()):
        overrides = (
            f"task.model.name={model}",
            f"precision={{mode: {mode}}}",
            f"optim={{kind: {optim}, lr: 1e-4}}",
            f"train={{steps: 1, global_batch_size: {MANY}}}",
            "data={kind: text, sequence_length: 128}",
            "task.model.values={vocab_size: 30522}",
            engine % (", activation_checkpointing: true" if checkpointing else ""),
        )
        recipe = load_recipe("recipes/bert-base-mlm.yaml", overrides).recipe
        refused = mode_problems(recipe.engine, numerics(recipe.precision.mode))
        if not refused and not list(optim_problems(recipe, cpu)):
            recipes[optim][name] = recipe
    local = recipes["adamw"]["local"]
    data = task_of(local.task).load_data(local.task, local.data)
    weights = meta_model(local, data)
    fp32 = fp32_islands(local.precision, weights, cpu, CPU)
    steps = [run_step(local, data, cpu, size, fp32) for size in (FEW, MANY)]
    found = {}
    for optim, by_engine in recipes.items():
        options = by_engine["local"].optim
        named = list(weights.named_parameters())
        state = state_bytes(options, named, weights_apart(options, weights))
        few, many = (replace(step, optimizer=state) for step in steps)
        found[optim] = Bert(few, many, by_engine, data, fp32)
    return found


def bert_tables() -> None:
    """Print what BERT needs on a device, and what fits which, by engine, mode and optimizer."""
    needs = ["Model | Optimizer | Mode | Engine | Ranks | Parts | Activations | Peak | Host"]
    needs.append("|".join(["---"] * 9))
    fits = [f"Model | Optimizer | Mode | Engine | {' | '.join(f'{g} GiB' for g in DEVICES)}"]
    fits.append("|".join(["---"] * 8))
    for model, mode in itertools.product(("bert-base", "bert-large"), MODES):
        whole, less = (bert(model, mode, checkpointing=is_on) for is_on in (False, True))
        for optim in whole:
            kept, again = whole[optim], less[optim]
            for engine in kept.recipes:
                memory = kept.memory(engine, kept.few, 1)
                numbers = (always(memory), memory.activations, memory.peak, memory.host)
                about = f"{model} | {optim} | {mode} | {engine}"
                in_gib = " | ".join(f"{number / GIB:.2f}" for number in numbers)
                needs.append(f"{about} | {ENGINES[engine][0]} | {in_gib}")
                rooms = [size - RESERVED for size in DEVICES]
                both = zip(kept.largest(engine, rooms), again.largest(engine, rooms), strict=True)
                fits.append(f"{about} | {' | '.join(f'{one} / {other}' for one, other in both)}")
    for table in (needs, fits):
        print("\n".join(f"| {row} |" for row in table), end="\n\n")


def with_data(folder: Path) -> None:
    """Images shaped as CIFAR-10's, where recipes look for them."""
    write_tiny_cifar(folder / "cifar10", num_train=128)
    os.environ["MPTRAIN_DATA"] = str(folder)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bert", action="store_true", help="what BERT needs, in GiB")
    if parser.parse_args().bert:
        bert_tables()
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
        print("\n| Model | Mode | Engine | Batch | Planned | at | Measured | Off |")
        print("|---|---|---|---|---|---|---|---|")
        with ranks_of(2) as pair:
            for engine, now in divided_cells(pair):
                print(
                    f"| {now.model} | {now.mode} | {engine} | {now.batch} "
                    f"| {now.planned.peak / MIB:.1f} MiB | {now.planned.peak_at} "
                    f"| {now.measured / MIB:.1f} MiB | {now.error:+.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
