"""Sweeps for real: docs/loss-scale.md shows what they print (`make verify`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import MPTRAIN
from tests.verify.page import machine
from tests.verify.test_precision import ROOT, docs

pytestmark = pytest.mark.verify
PAGE = ROOT / "docs" / "loss-scale.md"
PLUGIN = ROOT / "tests" / "sweep" / "tiny_gradients.py"

TINY = """\
name: tiny-gradients
task: {kind: plugin, factor: 1e-4}
data: {kind: plugin}
precision: {mode: fp16}
optim: {kind: adam, lr: 1e-3, eps: 1e-12}
train: {steps: 60, global_batch_size: 32}
eval: {every: null}
"""


def sweep(folder: Path, region: str, *command: str) -> dict[str, Any]:
    """Run a sweep in a folder, put what it prints into the page, and return its result."""
    shown = " ".join(command)
    process = subprocess.run(
        [MPTRAIN, "sweep", *command, "--jobs", "2", "--output", "sweep"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    printed = process.stdout.partition("\n--- ")[0].rstrip()
    text = f"{machine()}```text\n$ mptrain sweep {shown} --jobs 2\n\n{printed}\n```\n"
    PAGE.write_text(docs().between(PAGE.read_text("utf-8"), region, text, "make verify"), "utf-8")
    return json.loads((folder / "sweep" / "result.json").read_text())


def recipe(folder: Path, name: str) -> None:
    (folder / f"{name}.yaml").write_text((ROOT / "recipes" / f"{name}.yaml").read_text())


def row(result: dict[str, Any], label: str) -> dict[str, Any]:
    """The row of a label."""
    return next(row for row in result["rows"] if row["label"] == label)


def test_fp16_fails_at_a_scale_of_1_and_matches_fp32_at_the_recommended_one(tmp_path):
    (tmp_path / "tiny-gradients.yaml").write_text(TINY)
    (tmp_path / "tiny_gradients.py").write_text(PLUGIN.read_text())
    result = sweep(
        tmp_path, "loss scale of tiny gradients", "loss-scale", "tiny-gradients.yaml",
        "--plugin", "tiny_gradients.py", "--values", "1,2^4,2^8,2^12,2^16", "--steps", "60",
        "--seeds", "2",
    )  # fmt: skip
    assert not row(result, "scale=1")["matches_fp32"]
    assert result["recommended"]["confirmed"]
    (exact,) = {t["loss"] for t in result["trials"] if (t["label"], t["seed"]) == ("fp32", 0)}
    (failed,) = {t["loss"] for t in result["trials"] if (t["label"], t["seed"]) == ("scale=1", 0)}
    assert failed > 3 * exact


def test_digits(tmp_path):
    recipe(tmp_path, "digits-fp16")
    result = sweep(tmp_path, "loss scale of digits", "loss-scale", "digits-fp16.yaml")
    assert result["recommended"]["confirmed"]


def test_cifar10(tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("MPTRAIN_DATA", str(shared_data))
    recipe(tmp_path, "cifar10-fp16")
    result = sweep(
        tmp_path, "loss scale of CIFAR-10", "loss-scale", "cifar10-fp16.yaml",
        "--values", "1,2^8,2^16,2^24,dynamic", "--steps", "30",
        "--set", "train.global_batch_size=32",
    )  # fmt: skip
    assert result["recommended"]["confirmed"]


def test_precision_of_digits_with_5_seeds(tmp_path):
    recipe(tmp_path, "digits-fp16")
    result = sweep(
        tmp_path, "precision of digits", "precision", "digits-fp16.yaml", "--seeds", "5",
    )  # fmt: skip
    scores = {}
    for path in tmp_path.glob("sweep/trials/*/result.json"):
        mode, _, seed = path.parent.name.rpartition("-seed")
        metrics = json.loads(path.read_text())["metrics"]["eval"]
        scores.setdefault(mode, {})[int(seed)] = metrics["accuracy"]
    exact = np.array([scores["fp32"][seed] for seed in range(5)])
    assert {"fp32", "bf16", "fp16"} <= {row["mode"] for row in result["rows"]}
    for found in result["rows"]:
        values = np.array([scores[found["mode"]][seed] for seed in range(5)])
        assert found["mean"] == pytest.approx(values.mean())
        assert found["standard_error"] == pytest.approx(np.std(values, ddof=1) / 5**0.5)
        if found["mode"] != "fp32":
            error = np.std(values - exact, ddof=1) / 5**0.5
            assert found["difference"] == pytest.approx((values - exact).mean())
            assert found["difference_standard_error"] == pytest.approx(error)
