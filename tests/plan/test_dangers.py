"""What a recipe alone shows to be unsafe is warned of by the id of its finding."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcli.plan import make_plan
from tests.small import CPU, small_recipe

FP16 = "precision={mode: fp16, loss_scale: {kind: dynamic, %s}}"
ADAM = "optim={kind: adamw, lr: %s, eps: %s}"


def warned(tmp_path: Path, *settings: str) -> list[tuple[str | None, str]]:
    plan = make_plan(small_recipe(tmp_path, *settings).recipe, CPU)
    return [(warning.finding, warning.path) for warning in plan.warnings]


@pytest.mark.parametrize(
    ("setting", "finding", "path"),
    [
        (FP16 % "growth_interval: 5", "skip-storm", "precision.loss_scale.growth_interval"),
        (FP16 % "backoff_factor: 0.9999", "skip-storm", "precision.loss_scale.growth_interval"),
        (FP16 % "backoff_factor: 1e-4", "underflow", "precision.loss_scale.backoff_factor"),
        (FP16 % "min_scale: 0.01", "scale-collapse", "precision.loss_scale.min_scale"),
        (ADAM % (1e-3, 1.0), "adam-eps", "optim.eps"),
        (ADAM % (1e-3, 1e-30), "adam-eps", "optim.eps"),
        (ADAM % (10, 1e-8), "learning-rate", "optim.lr"),
        (ADAM % (1e-9, 1e-8), "learning-rate", "optim.lr"),
        ("optim={kind: sgd, lr: 5000}", "learning-rate", "optim.lr"),
        ("train.micro_batch_size=2", "batchnorm-stats", "train.micro_batch_size"),
    ],
)
def test_dangers(tmp_path: Path, setting: str, finding: str, path: str) -> None:
    assert warned(tmp_path, setting) == [(finding, path)]


@pytest.mark.parametrize(
    "setting",
    [
        FP16 % "growth_interval: 100",
        FP16 % "growth_interval: 5, max_scale: 65536",  # which cannot grow
        FP16 % "hysteresis: 2, backoff_factor: 0.25",
        ADAM % (1e-2, 1e-3),
        "train.micro_batch_size=4",
    ],
)
def test_what_is_unusual_but_sound(tmp_path: Path, setting: str) -> None:
    assert warned(tmp_path, setting) == []


def test_few_samples_do_no_harm_without_batchnorm(tmp_path: Path) -> None:
    vit = "task.model={kind: vit, patch_size: 4, layers: 1, width: 16, heads: 2, mlp_width: 16}"
    assert warned(tmp_path, vit, "train.micro_batch_size=1") == []


@pytest.mark.parametrize(("lr", "findings"), [(5, 1), (1e-9, 1), (0.02, 0)])
def test_muons_rate_is_adams(tmp_path: Path, lr: float, findings: int) -> None:
    vit = "task.model={kind: vit, patch_size: 4, layers: 1, width: 16, heads: 2, mlp_width: 16}"
    muon = f"optim={{kind: muon, lr: {lr}}}"
    assert warned(tmp_path, vit, muon) == [("learning-rate", "optim.lr")] * findings
