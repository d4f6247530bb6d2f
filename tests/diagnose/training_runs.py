"""Runs of `training_plugin.py` in this process, and the evidence of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.replay import replay
from mpcli.diagnose.run import run_evidence
from mpcli.launch import launch
from mpcli.plan import make_plan
from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import PluginFile, load_plugin
from mpcli.rundir import RunDirectory
from tests.small import CPU, Silent

PLUGIN = Path(__file__).parent / "training_plugin.py"
RECIPE = """\
name: training
task: {kind: plugin, model: %s}
data: {kind: plugin}
precision: {mode: fp32}
optim: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {steps: 40, global_batch_size: 16}
eval: {every: null}
probe: {every: 10}
engine: {kind: local, device: cpu}
"""
ADAM = "optim={kind: adamw, lr: 0.01}"


def training_run(
    folder: Path, model: str, *overrides: str, fix: tuple[str, ...] = ()
) -> tuple[RunDirectory, PluginFile]:
    """Train a model of the plug-in with `--set` values; in fp32 with SGD if nothing is said.

    Args:
        fix: more `--set` values, of the recipe that results from the others.
    """
    plugin = load_plugin(str(PLUGIN))
    path = folder / "training.yaml"
    path.write_text(RECIPE % model)
    loaded = load_recipe(path, overrides, plugin)
    if fix:
        path.write_text(resolved_yaml(loaded.recipe))
        loaded = load_recipe(path, fix, plugin)
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, folder / "run")
    launch(run, Silent(), plugin)
    return RunDirectory.read(run.path), plugin


def evidence_of(run: RunDirectory, plugin: PluginFile, *, again: bool = False) -> Evidence:
    """What `diagnose` reasons from.

    Args:
        again: with a step that is run again.
    """
    evidence = run_evidence(run, load_recipe(run.recipe_path, plugin=plugin).recipe)
    return replace(evidence, replay=replay(run, plugin=plugin)) if again else evidence


def trained(
    folder: Path, model: str, *overrides: str, fix: tuple[str, ...] = (), again: bool = False
) -> Evidence:
    """The evidence of such a run."""
    return evidence_of(*training_run(folder, model, *overrides, fix=fix), again=again)
