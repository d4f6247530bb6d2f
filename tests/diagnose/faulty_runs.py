"""Runs of `faulty_plugin.py` in this process."""

from __future__ import annotations

from pathlib import Path

from mpcli.launch import launch
from mpcli.plan import make_plan
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import PluginFile, load_plugin
from mpcli.rundir import RunDirectory
from tests.small import CPU, Silent

PLUGIN = Path(__file__).parent / "faulty_plugin.py"
RECIPE = """\
name: faulty
task: {kind: plugin, model: %s, layer: "%s", fault: %s}
data: {kind: plugin}
precision: {mode: fp16, loss_scale: {kind: static, scale: 4096}}
optim: {kind: sgd, lr: 0.01}
train: {steps: 4, global_batch_size: 8, on_nonfinite: stop}
eval: {every: null}
engine: {kind: local, device: cpu}
"""


def faulty_run(
    folder: Path, model: str, layer: str, fault: str, *overrides: str
) -> tuple[RunDirectory, PluginFile]:
    """Train the plug-in's task, in fp16 with a static loss scale if nothing else is said."""
    plugin = load_plugin(str(PLUGIN))
    path = folder / "faulty.yaml"
    path.write_text(RECIPE % (model, layer, fault))
    loaded = load_recipe(path, overrides, plugin)
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, folder / "run")
    launch(run, Silent(), plugin)
    return RunDirectory.read(run.path), plugin
