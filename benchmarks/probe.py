"""CPU time that the probe adds to a step, per sampled step and at one in a hundred.

Per recipe, in fp32, where steps are fastest, in one process on one thread: steps without any
evidence and sampled ones, in pairs of random order, with everything that a run does for a sampled
step (hooks, statistics, copies of the weights, records, the file). What is done around the other 99
steps (their random state is kept) is far below what two steps differ by, so it is timed by itself.
The share is (extra of a sampled step + 99 of those) / 100 steps; the interval is that of the mean
over the pairs. $MPTRAIN_DATA has to hold CIFAR-10.

    make bench-probe
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mpcli.engines.base import Outcome
from mpcli.engines.local import LocalEngine
from mpcli.evidence import Evidence
from mpcli.machine import detect_machine
from mpcli.plan import make_plan
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import templates
from mpcli.records import StepRecord
from mpcli.rundir import RunDirectory
from mpcli.tasks import task_of
from mpcli.trainer import settings

RECIPES = {
    "cifar10-fp32": [],
    "cifar10-resnet18": ["precision.mode=fp32", "train.global_batch_size=64"],
    "bert-tiny-mlm": [],
}
EVERY = 100


def measure(name: str, overrides: list[str], seconds: float) -> list[tuple[float, float, float]]:
    """Pairs of steps: seconds of (a plain one, a sampled one, watching one that is not sampled)."""
    loaded = load_recipe(templates()[name], [*RECIPES.get(name, []), "probe.every=1", *overrides])
    recipe, plan = loaded.recipe, make_plan(loaded.recipe, detect_machine())
    device, task = torch.device(plan.device), task_of(recipe.task)
    with settings(recipe, plan), tempfile.TemporaryDirectory() as folder:
        data = task.load_data(recipe.task, recipe.data)
        data.prepare(device)
        model = task.build_model(recipe.task, data.info).to(device)
        engine = LocalEngine(recipe, model, device, plan.steps, plan.fp32_modules)
        run = RunDirectory.create(loaded, plan, {}, Path(folder, "run"))
        never = recipe.model_copy(update={"probe": recipe.probe.model_copy(update={"every": 0})})
        watch, sample = (
            Evidence(which, run, engine, data, device, lambda: model) for which in (never, recipe)
        )
        batch = data.train_batch(0, 0, recipe.train.global_batch_size)
        loss = partial(task.loss, recipe.task)
        row = StepRecord(
            step=1, attempt=1, loss=0.0, lr=0.0, grad_norm=0.0, scale=1.0, applied=True,
            samples_per_second=0.0, memory_allocated_bytes=0, memory_peak_bytes=0,
        )  # fmt: skip

        def plain_step() -> Outcome:
            engine.accumulate(loss, batch, batch.weight, last=True)
            engine.applied.zero_()  # however many steps: at the first learning rate
            return engine.step()

        def watched_step(number: int, evidence: Evidence, step: Callable[[], Outcome]) -> None:
            this = row.model_copy(update={"step": number})
            evidence.before_step(number, loss, [batch], batch.weight)
            evidence.after_step(number, step())
            evidence.add(this)
            evidence.write(number, wait=True)

        def seconds_of(call: Callable[[int], object], number: int) -> float:
            started = now(device)
            call(number)
            return now(device) - started

        outcome = plain_step()
        calls = [
            lambda number: plain_step(),
            lambda number: watched_step(number, sample, plain_step),
            lambda number: watched_step(number, watch, lambda: outcome),
        ]
        for number in (1, 2, 3):  # the first of each kind make what the others use again
            for call in calls:
                call(number)
        pairs, end = [], time.monotonic() + seconds
        while time.monotonic() < end or len(pairs) < 10:
            number += 1
            order = random.sample(range(3), 3)
            times = {which: seconds_of(calls[which], number) for which in order}
            pairs.append((times[0], times[1], times[2]))
        run.close()
    return pairs


def now(device: torch.device) -> float:
    """CPU time of the process; on a GPU the time when all work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interval(values: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the mean."""
    generator = random.Random(0)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(2000))
    return means[50], means[1949]


def main() -> None:
    """Print a row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", action="append", choices=list(RECIPES))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each recipe")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'recipe':18} {'pairs':>5} {'step':>9} {'sampled':>9}   at 1 in {EVERY} (95% interval)")
    for name in arguments.recipe or RECIPES:
        pairs = measure(name, arguments.set, arguments.seconds)
        step, sampled, _ = map(statistics.fmean, zip(*pairs, strict=True))
        extras = [(b - a + (EVERY - 1) * watching) / EVERY / step for a, b, watching in pairs]
        low, high = interval(extras)
        print(
            f"{name:18} {len(pairs):5} {1e3 * step:6.1f} ms {sampled / step:8.2f}x   "
            f"{statistics.fmean(extras):.2%} ({low:.2%} to {high:.2%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
