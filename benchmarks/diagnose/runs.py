"""Runs of the benchmark's task in this process, and what the command line says of them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.diagnose.task import Family
from mpcli.cli.app import main
from mpcli.launch import launch
from mpcli.machine import Machine, detect_machine
from mpcli.plan import make_plan
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import PluginFile, load_plugin
from mpcli.recipe.recipe import Recipe
from mpcli.records import EvalRecord, Plan, StepRecord
from mpcli.rundir import RunDirectory

TASK = str(Path(__file__).with_name("task.py"))
OPTIM = {
    "convnet": "{kind: sgd, lr: 0.1, momentum: 0.9, schedule: {kind: linear, warmup: 0.1}}",
    "residual": "{kind: sgd, lr: 0.1, momentum: 0.9, schedule: {kind: linear, warmup: 0.1}}",
    "transformer": "{kind: adamw, lr: 0.01, schedule: {kind: linear, warmup: 0.1}}",
    "mlp": "{kind: adamw, lr: 0.01, schedule: {kind: linear, warmup: 0.1}}",
}
RECIPE = """\
name: {family}
task: {{kind: plugin, model: {family}}}
data: {{kind: plugin}}
precision: {{mode: fp16}}
optim: {optim}
train: {{steps: 60, global_batch_size: 16, seed: {seed}}}
eval: {{every: null}}
engine: {{kind: local, device: cpu}}
probe: {{every: 10}}
output: {{checkpoint_every: null}}
"""


@dataclass(frozen=True)
class Trained:
    """How a training ended.

    `loss` is that of the images that were held out, infinite where there is none; `skipped` a share
    of the steps.
    """

    loss: float
    skipped: float
    status: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Silent:
    """A display that shows nothing."""

    def start(self, plan: Plan, recipe: Recipe) -> None:
        pass

    def steps(self, rows: Sequence[StepRecord]) -> None:
        pass

    def evaluated(self, row: EvalRecord) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


@functools.cache
def plugin() -> PluginFile:
    return load_plugin(TASK)


@functools.cache
def machine() -> Machine:
    return detect_machine()


def train(family: Family, overrides: Sequence[str], seed: int, folder: Path) -> Trained:
    """Train a family's recipe with `--set` values; the run directory is `folder`/run.

    Raises:
        UserError: the recipe cannot be run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(family=family, optim=OPTIM[family], seed=seed), "utf-8")
    return train_recipe(path, overrides, folder)


def train_recipe(path: Path, overrides: Sequence[str], folder: Path) -> Trained:
    """Train any recipe of the task with `--set` values; the run directory is `folder`/run.

    Raises:
        UserError: the recipe cannot be run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_recipe(path, list(overrides), plugin())
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, machine()), {}, folder / "run")
    with mock.patch("mpcli.launch.halved", return_value=None):  # which would mend out-of-memory
        result = launch(run, _Silent(), loaded.plugin)
    loss = result.metrics.get("eval", {}).get("loss", math.inf)
    return Trained(
        loss=loss if math.isfinite(loss) else math.inf,
        skipped=result.steps_skipped / max(result.steps_attempted, 1),
        status=result.status,
    )


def diagnosis(path: Path, *, of_plugin: bool) -> dict[str, Any]:
    """What `mptrain diagnose --json` prints of a path."""
    named = ["--plugin", TASK] if of_plugin else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["diagnose", str(path), "--json", *named])
    said: dict[str, Any] = json.loads(out.getvalue())
    if code:
        raise RuntimeError(f"diagnose ended with {code}: {said.get('problems')}")
    return said
