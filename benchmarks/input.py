"""Images or tokens per second of the input pipeline alone, beside those that training takes.

Per recipe: batches are made (order, augmentation, masking) and thrown away; then the same
process trains on one batch again and again. Both on this machine's device, with batches of at most
64 samples. Where the first number is far above the second, training never waits for data.

    make bench-input
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from mpcli.engines.local import LocalEngine
from mpcli.machine import detect_machine
from mpcli.plan import make_plan
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import templates
from mpcli.tasks import task_of
from mpcli.trainer import settings

RECIPES = (
    *("digits-fp32", "cifar10-fp32", "cifar10-resnet18", "cifar10-vit"),
    *("bert-tiny-mlm", "gpt-small", "sst2"),
)
SECONDS = 3.0


def calls_per_second(function: Callable[[int], object], device: torch.device) -> float:
    """How often `function` runs in a second, after a first call."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    function(0)
    finish()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        calls += 1
        function(calls)
        finish()
    return calls / (time.perf_counter() - start)


def measure(name: str, overrides: list[str]) -> tuple[str, int, float, float]:
    """(what is counted, how many in a batch, batches per second of the input, of training)."""
    size = min(64, load_recipe(templates()[name], overrides).recipe.train.global_batch_size)
    size_too = [*overrides, f"train.global_batch_size={size}"]
    recipe = load_recipe(templates()[name], size_too).recipe
    plan = make_plan(recipe, detect_machine())
    device, task = torch.device(plan.device), task_of(recipe.task)
    with settings(recipe, plan):
        data = task.load_data(recipe.task, recipe.data)
        data.prepare(device)
        model = task.build_model(recipe.task, data.info).to(device)
        engine = LocalEngine(recipe, model, device, plan.steps, plan.fp32_modules)
        batch = data.train_batch(0, 0, size)
        loss = partial(task.loss, recipe.task)

        def step(_: int) -> None:
            engine.accumulate(loss, batch, batch.weight, last=True)
            engine.step()
            engine.applied.zero_()  # however many steps: at the first learning rate

        made = calls_per_second(lambda number: data.train_batch(0, number, size), device)
        trained = calls_per_second(step, device)
    if "input_ids" in batch.tensors:
        return "tokens", batch["input_ids"].numel(), made, trained
    return "images", size, made, trained


def main() -> None:
    """Print a row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="names of templates")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    print("| recipe | batch | input, per second | training, per second | input's share of a step |")
    print("| --- | --- | --- | --- | --- |")
    for name in arguments.recipes:
        counted, size, made, trained = measure(name, arguments.overrides)
        share = trained / (made + trained)
        rates = f"{made * size:,.0f} | {trained * size:,.0f}"
        print(f"| {name} | {size:,} {counted} | {rates} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
