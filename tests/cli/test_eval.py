"""`mptrain eval`: the numbers of the run's own evaluation, and of other precisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpcli.evaluation import evaluate, load_weights
from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.load import load_recipe
from mpcli.rundir import RunDirectory
from mpcli.tasks import image_classification
from tests.small import CPU, run_small

EMA = "train={steps: 6, global_batch_size: 16, ema: 0.5}"


def score(run: RunDirectory, *overrides: str, checkpoint: str | None = None) -> dict[str, float]:
    own = load_recipe(run.recipe_path).recipe
    recipe = load_recipe(run.recipe_path, overrides).recipe
    return evaluate(recipe, make_plan(recipe, CPU), load_weights(run, own, checkpoint))


def evaluations(run: RunDirectory) -> dict[int, dict[str, float]]:
    rows = map(json.loads, (run.path / "evals.jsonl").read_text().splitlines())
    return {row["step"]: {"loss": row["loss"], "accuracy": row["accuracy"]} for row in rows}


@pytest.mark.parametrize("average", [[], [EMA]], ids=["last", "average"])
@pytest.mark.parametrize("mode", ["fp32", "fp16", "bf16-master", "bf16-pure"])
def test_the_numbers_are_those_of_the_run(tmp_path: Path, mode: str, average: list[str]) -> None:
    run, result = run_small(
        tmp_path,
        "train.steps=6",
        f"precision={{mode: {mode}, sensitive_layers: [head]}}",
        "optim={kind: sgd, lr: 0.05}",
        "eval.every=2 steps",
        "output={checkpoint_every: 2 steps, keep_last: 3, keep_best: loss}",
        *average,
    )
    expected = evaluations(run)
    assert score(run) == expected[6] == result.metrics["eval"]
    for step in (2, 4, 6):
        assert score(run, checkpoint=f"{step}") == expected[step]
    best = min(expected, key=lambda step: expected[step]["loss"])
    assert result.best_checkpoint == f"checkpoints/step-{best}"
    assert score(run, checkpoint="best") == expected[best]


def test_another_precision_gives_other_numbers_near_by(tmp_path: Path) -> None:
    run, result = run_small(tmp_path, "train.steps=20")
    exact, half = result.metrics["eval"]["loss"], score(run, "precision.mode=bf16")["loss"]
    assert exact != half == pytest.approx(exact, rel=0.02)


def test_other_data(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        score(run, f"data={{kind: cifar10, path: {tmp_path / 'none'}}}")


def test_another_model_is_refused(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path)
    with pytest.raises(UserError, match=r"final is of another model: `blocks.0.conv.weight` is"):
        score(run, "task.model.width=8")
    (run.final_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"final/model.safetensors cannot be read") as caught:
        score(run)
    assert caught.value.exit_code == Exit.CHECKPOINT


def test_before_the_end_the_newest_checkpoint_is_scored(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "eval.every=2 steps", "output.checkpoint_every=2 steps")
    run.final_path.rename(tmp_path / "gone")
    recipe = load_recipe(run.recipe_path).recipe
    assert load_weights(run, recipe).name == "checkpoints/step-4"
    assert score(run) == evaluations(run)[4]


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "output.checkpoint_every=null")
    for wanted, what in (("9", "no weights yet"), ("best", "no weights yet")):
        with pytest.raises(UserError, match=what):
            score(run, checkpoint=wanted)
    run, _ = run_small(tmp_path, name="other")
    for wanted, what in (("9", "of the steps 4"), ("best", "keep_best"), ("last", "expected `be")):
        with pytest.raises(UserError) as caught:
            score(run, checkpoint=wanted)
        (problem,) = caught.value.problems
        assert what in f"{problem.what} {problem.hint}"
        assert caught.value.exit_code == Exit.USAGE


class Tied(nn.Module):
    """Two names of one weight, and a part that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64)
        self.again.weight = self.body.weight
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.frozen(torch.relu(self.body(images.flatten(1))))
        logits: torch.Tensor = self.head(torch.relu(self.again(features)))
        return logits


@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
def test_tied_and_frozen_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(image_classification, "build_model", lambda options, info: Tied())
    monkeypatch.setattr("mpcli.final.loader_text", lambda *_: "")
    run, result = run_small(tmp_path, f"precision.mode={mode}")
    assert score(run) == score(run, checkpoint="4") == result.metrics["eval"]
    saved = load_weights(run, load_recipe(run.recipe_path).recipe).tensors
    torch.manual_seed(0)
    fresh = Tied()
    assert torch.equal(saved["frozen.weight"], fresh.frozen.weight)  # not rounded to half
    assert torch.equal(saved["body.weight"], saved["again.weight"])
    fresh.load_state_dict(saved)


def test_the_command_takes_the_newest_run(
    mptrain: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no runs in the folder" in mptrain("eval").err
    for seed in ("0", "1"):
        done = mptrain("run", recipe, "--set", f"train.seed={seed}", "--json").json
    outcome = mptrain("eval", "--json").json
    assert outcome["metrics"]["eval"] == done["metrics"]["eval"]
    assert (outcome["status"], outcome["checkpoint"]) == ("done", "final")
    shown = mptrain("eval", "runs/tiny/latest", "--checkpoint", "6").out
    assert f"eval accuracy  {done['metrics']['eval']['accuracy']:.2%}" in shown
    assert "checkpoints/step-6" in shown
    assert "tiny.yaml" in mptrain("eval", ".").err
    strange = mptrain("eval", "nowhere")
    assert (strange.code, strange.err.splitlines()[0]) == (2, "error: nowhere: no such folder")
