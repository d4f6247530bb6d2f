"""Train digits in one precision and count what the numbers lost: a process of its own.

Prints one JSON object: status, accuracy, loss, skipped steps, and over all applied steps the shares
of elements with a non-zero gradient whose weight did not change and whose second moment is zero.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcli.engines.local import LocalEngine
from mpcli.launch import launch
from mpcli.machine import detect_machine
from mpcli.plan import make_plan
from mpcli.recipe.load import load_recipe
from mpcli.rundir import RunDirectory
from tests.small import Silent

RECIPE = """\
name: digits
task: {kind: image-classification, model: {kind: smallnet, width: 8}}
data: {kind: digits}
optim: {kind: adamw, lr: 0.001}
train: {steps: 1, global_batch_size: 64}
eval: {every: null}
engine: {kind: local, device: cpu}
"""


class Losses:
    """Counts over every applied update of this process's engine."""

    def __init__(self) -> None:
        self.with_gradient = self.unchanged = self.without_moment = 0

    def watch(self) -> None:
        """Begin to count."""
        update = LocalEngine._update

        def counted(engine: LocalEngine, gradients: list[Tensor | None]) -> None:
            before = [master.detach().clone() for master in engine.masters]
            moved = [None if g is None else g != 0 for g in gradients]
            update(engine, gradients)
            if not engine.optimizer.found_inf:  # type: ignore[attr-defined]
                for master, old, nonzero in zip(engine.masters, before, moved, strict=True):
                    if nonzero is not None:
                        self.add(engine, master, old, nonzero)

        LocalEngine._update = counted  # type: ignore[method-assign]

    def add(self, engine: LocalEngine, weight: Tensor, old: Tensor, nonzero: Tensor) -> None:
        moment = engine.optimizer.state[weight].get("exp_avg_sq")
        self.with_gradient += int(nonzero.sum())
        self.unchanged += int((nonzero & (weight == old)).sum())
        if moment is not None:
            self.without_moment += int((nonzero & (moment == 0)).sum())


def main(*overrides: str) -> dict[str, Any]:
    """Train with `--set` values."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.yaml")
        path.write_text(RECIPE)
        loaded = load_recipe(path, overrides)
        losses = Losses()
        losses.watch()
        plan = make_plan(loaded.recipe, detect_machine())
        run = RunDirectory.create(loaded, plan, {}, Path(folder, "run"))
        result = launch(run, Silent())
    counted = max(losses.with_gradient, 1)
    return {
        "status": result.status,
        "accuracy": result.metrics.get("eval", {}).get("accuracy"),
        "loss": result.metrics["train"]["loss"],
        "skipped": result.steps_skipped,
        "unchanged": losses.unchanged / counted,
        "without_moment": losses.without_moment / counted,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
