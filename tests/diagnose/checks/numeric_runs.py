"""Runs of `numeric_faults.py` in this process, and what the checks find in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mpcli import Recorder
from mpcli.diagnose.checks import findings
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding
from mpcli.diagnose.places import gather
from mpcli.diagnose.ranking import ranked
from mpcli.diagnose.replay import replay
from mpcli.launch import launch
from mpcli.plan import make_plan
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import PluginFile, load_plugin
from mpcli.rundir import RunDirectory
from tests.diagnose.checks.numeric_faults import build_model
from tests.small import CPU, Silent

PLUGIN = Path(__file__).parent / "numeric_faults.py"
RECIPE = """\
name: odd
task: {kind: plugin, layer: %s}
data: {kind: plugin}
precision: {mode: fp16}
optim: {kind: sgd, lr: 0.01}
train: {steps: 30, global_batch_size: 8}
eval: {every: null}
engine: {kind: local, device: cpu}
"""


def odd_run(folder: Path, layer: str, *overrides: str) -> tuple[RunDirectory, PluginFile]:
    """Train with an odd layer (it is number 2), in fp16 with a dynamic scale."""
    plugin = load_plugin(str(PLUGIN))
    path = folder / "odd.yaml"
    path.write_text(RECIPE % layer)
    loaded = load_recipe(path, overrides, plugin)
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, folder / "run")
    launch(run, Silent(), plugin)
    return RunDirectory.read(run.path), plugin


def evidence_of(run: RunDirectory, plugin: PluginFile | None, *, again: bool = True) -> Evidence:
    """All of it; `again`: with a replay."""
    evidence = gather(run.path)
    return replace(evidence, replay=replay(run, plugin=plugin)) if again else evidence


def causes(evidence: Evidence) -> list[Finding]:
    """What a person is told, but for what is information alone."""
    return [found for found in ranked(findings(evidence)) if found.severity != "info"]


def foreign_run(
    folder: Path,
    layer: str,
    *,
    half: bool = True,
    scaled: bool = True,
    scaler: dict[str, Any] | None = None,
    bad: float | None = None,
    loss: float = 1.0,
) -> Evidence:
    """What a recorder writes of a hand-written loop of 30 steps.

    Args:
        scaler: arguments of a GradScaler.
        bad: a value in the batch of step 6.
        loss: a factor.
    """
    torch.manual_seed(0)
    model = build_model(SimpleNamespace(layer=layer), None)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scales = torch.amp.GradScaler("cpu", enabled=scaled, **(scaler or {}))
    recorder = Recorder(model, optimizer, scales if scaled else None, out=folder, every=10)
    for number in range(30):
        inputs, targets = torch.randn(8, 16), torch.randint(3, (8,))
        if bad is not None and number == 5:
            inputs[2, 3] = bad
        with recorder.step((inputs, targets)):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                value = nn.functional.cross_entropy(model(inputs).float(), targets) * loss
            scales.scale(value).backward()
            scales.step(optimizer)
            scales.update()
    recorder.close()
    return gather(folder)
