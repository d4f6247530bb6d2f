"""A small recipe and ways to run it in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpcli.launch import launch
from mpcli.machine import Machine
from mpcli.plan import make_plan
from mpcli.recipe.changes import allowed_changes
from mpcli.recipe.load import LoadedRecipe, load_recipe
from mpcli.recipe.recipe import Recipe
from mpcli.records import EvalRecord, Plan, Result, StepRecord
from mpcli.rundir import RunDirectory

CPU = Machine(cuda_devices=(), emulated={}, unsupported={})

RECIPE = """\
name: small
task: {kind: image-classification, model: {kind: smallnet, width: 4}}
data: {kind: digits}
precision: {mode: fp32}
optim: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {steps: 4, global_batch_size: 16}
eval: {every: null}
engine: {kind: local, device: cpu}
"""


class Silent:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.rows: list[StepRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.closed = False

    def start(self, plan: Plan, recipe: Recipe) -> None:
        pass

    def steps(self, rows: Sequence[StepRecord]) -> None:
        self.rows += rows

    def evaluated(self, row: EvalRecord) -> None:
        self.evaluations.append(row)

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def small_recipe(folder: Path, *overrides: str, text: str = RECIPE) -> LoadedRecipe:
    """The small recipe with `--set` values."""
    path = folder / "small.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def run_small(
    folder: Path,
    *overrides: str,
    name: str = "run",
    environment: dict[str, Any] | None = None,
    text: str = RECIPE,
) -> tuple[RunDirectory, Result]:
    """Train the small recipe in this process."""
    loaded = small_recipe(folder, *overrides, text=text)
    plan = make_plan(loaded.recipe, CPU)
    run = RunDirectory.create(loaded, plan, environment or {}, folder / name)
    return run, launch(run, Silent())


def resume_small(run: RunDirectory, *overrides: str) -> Result:
    """Go on with a run in this process, as `mptrain run --resume` does."""
    run = RunDirectory.open(run.path)
    loaded = load_recipe(run.recipe_path, overrides)
    changes = allowed_changes(load_recipe(run.recipe_path).recipe, loaded)
    run.begin_attempt(loaded.recipe, make_plan(loaded.recipe, CPU), {}, changes)
    return launch(run, Silent())
