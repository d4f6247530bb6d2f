"""CPU time per step that mptrain adds to a hand-written loop of the same job.

The job: scikit-learn's digits, an MLP whose fp32 step takes well under 1 ms, one thread. The
hand-written loop does what anybody would write: index a batch, forward, backward, fused step,
scheduler. Ours does all that a run does: transactional step, gradient norm, one JSON row per
step with memory and rate, display, evaluation at the end, the model saved. Neither saves
checkpoints: what one costs is benchmarks/checkpoint.py's.

Both run in processes of their own, in turn. In a process, the CPU time (user and system) of a
long and a short training are subtracted, so that start-up, evaluation and saving cancel.

    make bench-overhead
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHORT, LONG, BATCH, WIDTH = 1_000, 6_000, 64, 128
RECIPE = """\
name: overhead
task: {kind: image-classification, model: {kind: smallnet}}
data: {kind: digits}
precision: {mode: %s}
optim: {kind: sgd, lr: 0.1, momentum: 0.9, schedule: {kind: one-cycle}}
train: {steps: %d, global_batch_size: 64}
eval: {every: null}
engine: {kind: local, device: cpu}
output: {checkpoint_every: null}
"""


def mlp():
    """64 -> 128 -> 128 -> 10."""
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )


def by_hand(mode: str, steps: int) -> None:
    """The loop that a person writes, with torch's autocast and GradScaler where needed."""
    import torch

    from mpcli.data import digits

    images, labels = digits.load().train
    mean, std = images.float().mean(), images.float().std()
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps + 1)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mode)
    scaler = torch.amp.GradScaler("cpu", enabled=mode == "fp16")
    per_epoch = len(images) // BATCH
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images))
        indices = order[step % per_epoch * BATCH :][:BATCH]
        inputs = (images[indices].float() - mean) / std
        with torch.amp.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels[indices])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()


def ours(mode: str, steps: int) -> None:
    """The same job through the run directory, exactly as `mptrain run` does it."""
    from unittest import mock

    from mpcli.cli.console import LineDisplay
    from mpcli.launch import launch
    from mpcli.machine import Machine
    from mpcli.plan import make_plan
    from mpcli.recipe.load import load_recipe
    from mpcli.rundir import RunDirectory
    from mpcli.tasks import image_classification

    machine = Machine(cuda_devices=(), emulated={}, unsupported={})
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(image_classification, "build_model", lambda task, info: mlp()),
    ):
        path = Path(folder, "overhead.yaml")
        path.write_text(RECIPE % (mode, steps))
        loaded = load_recipe(path)
        run = RunDirectory.create(loaded, make_plan(loaded.recipe, machine), {}, Path(folder, "r"))
        result = launch(run, LineDisplay())
        assert result.steps_applied + result.steps_skipped == steps


def measure(side: str, mode: str) -> float:
    """Microseconds of CPU time per step in this process."""
    import torch

    torch.set_num_threads(1)
    loop = {"ours": ours, "by-hand": by_hand}[side]
    loop(mode, 200)
    times = []
    for steps in (SHORT, LONG):
        before = time.process_time()
        loop(mode, steps)
        times.append(time.process_time() - before)
    return (times[1] - times[0]) / (LONG - SHORT) * 1e6


def measure_in_process(side: str, mode: str) -> float:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", side, "--mode", mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    return json.loads(output.stdout)


def interval(differences: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(differences, k=len(differences))) for _ in range(2000)
    )
    return medians[50], medians[1949]


def main() -> None:
    """Print a row per mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="processes of each side")
    parser.add_argument("--mode", action="append", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--measure", choices=["ours", "by-hand"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    modes = arguments.mode or ["fp32"]
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, modes[0])))
        return
    print("CPU microseconds per step; median over interleaved processes")
    print(f"{'mode':6} {'by hand':>9} {'ours':>9} {'extra':>9}   95% interval of the extra")
    for mode in modes:
        pairs = [
            (measure_in_process("by-hand", mode), measure_in_process("ours", mode))
            for _ in range(arguments.pairs)
        ]
        differences = [ours - by_hand for by_hand, ours in pairs]
        low, high = interval(differences)
        print(
            f"{mode:6} {statistics.median(p[0] for p in pairs):9.1f} "
            f"{statistics.median(p[1] for p in pairs):9.1f} "
            f"{statistics.median(differences):9.1f}   {low:.1f} to {high:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
