"""Each optimizer beside AdamW: losses over seeds, and bytes of state (`make verify`)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mpcli.optim import state_bytes, weights_apart
from mpcli.recipe.recipe import Recipe
from mpcli.tasks import task_of
from tests.small import run_small, small_recipe
from tests.verify.page import machine
from tests.verify.test_precision import ROOT, docs

pytestmark = pytest.mark.verify
PAGE = ROOT / "docs" / "optimizers.md"
SEEDS = (0, 1, 2)
LAST = 20
"""Steps whose mean is a run's final loss."""

ADAM = "lr: 2e-3, betas: [0.9, 0.98], weight_decay: 0.01"
OPTIMIZERS = {
    "adamw": f"kind: adamw, {ADAM}",
    "adamw8bit, bitsandbytes": f"kind: adamw8bit, {ADAM}",
    "adamw8bit, torchao": f"kind: adamw8bit, implementation: torchao, {ADAM}",
    "adafactor": "kind: adafactor, lr: 0.05",
    "muon": f"kind: muon, {ADAM}",
}
TASKS = {
    "digits": """\
task:
  kind: image-classification
  model: {kind: vit, patch_size: 2, layers: 2, heads: 4, width: 64, mlp_width: 128}
data: {kind: digits}
train: {steps: 150, global_batch_size: 64, clip: {kind: norm, max_norm: 1.0}}
""",
    "BERT-tiny": """\
task: {kind: masked-lm, model: {kind: config, name: bert-tiny}}
data: {kind: text, path: null, sequence_length: 32, tokenizer: {kind: wordpiece, vocab_size: 512}}
train: {steps: 150, global_batch_size: 16, clip: {kind: norm, max_norm: 1.0}}
""",
}


class Measured(NamedTuple):
    """What became of the runs of one optimizer; bytes are of each parameter."""

    losses: list[float]
    planned: float
    held: float


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], Measured]]:
    """What was measured by task and optimizer, which is the page's table in the end."""
    found: dict[tuple[str, str], Measured] = {}
    yield found
    rows = [
        (
            task,
            f"`{optimizer}`",
            " ".join(f"{loss:.3f}" for loss in measured.losses),
            f"{statistics.mean(measured.losses):.3f}",
            f"{measured.planned:.3f}",
            f"{measured.held:.3f}",
        )
        for (task, optimizer), measured in found.items()
    ]
    columns = ("trained", "optimizer", "final loss by seed", "mean", "planned", "measured")
    text = machine() + docs().table(columns, rows)
    page = docs().between(PAGE.read_text("utf-8"), "optimizers", text, "make verify")
    PAGE.write_text(page, "utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_optimizers_beside_adamw(
    tmp_path: Path, task: str, table: dict[tuple[str, str], Measured]
) -> None:
    for optimizer, settings in OPTIMIZERS.items():
        runs = [_trained(tmp_path, TASKS[task], settings, seed) for seed in SEEDS]
        losses = [loss for loss, _ in runs]
        held = {bytes_ for _, bytes_ in runs}
        recipe = small_recipe(tmp_path, text=_text(TASKS[task], settings, 0)).recipe
        planned, parameters = _planned(recipe)
        table[task, optimizer] = Measured(losses, planned / parameters, held.pop() / parameters)
        assert not held
        assert table[task, optimizer].planned == table[task, optimizer].held

    means = {name: statistics.mean(table[task, name].losses) for name in OPTIMIZERS}
    for name, mean in means.items():
        assert mean < (1.05 if "8bit" in name else 1.25) * means["adamw"], name


def _text(task: str, optimizer: str, seed: int) -> str:
    return (
        f"name: optimizers\n{task}"
        f"optim: {{{optimizer}, schedule: {{kind: linear, warmup: 0.1}}}}\n"
        f"precision: {{mode: fp32}}\neval: {{every: null}}\nengine: {{kind: local, device: cpu}}\n"
    ).replace("train: {", f"train: {{seed: {seed}, ")


def _trained(folder: Path, task: str, optimizer: str, seed: int) -> tuple[float, int]:
    """Final loss of a run, and the bytes of its optimizer's state."""
    name = f"{len(list(folder.iterdir()))}"
    run, result = run_small(folder, name=name, text=_text(task, optimizer, seed))
    assert result.status == "done"
    losses = [row.loss for row in run.steps()]
    told = re.search(r"optimizer state: (\d+) bytes", run.log_path.read_text())
    assert told
    return statistics.mean(losses[-LAST:]), int(told[1])


def _planned(recipe: Recipe) -> tuple[int, int]:
    """Bytes of state, and the number of parameters, without either."""
    task = task_of(recipe.task)
    data = task.load_data(recipe.task, recipe.data)
    with torch.device("meta"):
        model = task.build_model(recipe.task, data.info)
    named = list(model.named_parameters())
    planned = state_bytes(recipe.optim, named, weights_apart(recipe.optim, model))
    return planned, sum(weight.numel() for _, weight in named)
