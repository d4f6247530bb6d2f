"""The long proofs on real CIFAR-10 (`make verify`); their table is docs/verification.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.verify.test_precision import docs

pytestmark = pytest.mark.verify
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "verification.md"
MPTRAIN = Path(sys.executable).with_name("mptrain")
STEPS, WINDOW = 100, 25


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str]]]:
    """Rows (what, measured), written to the committed table at the end."""
    rows: list[tuple[str, str]] = []
    yield rows
    about = (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}."
    )
    text = f"{about}\n\n{docs().table(('what', 'measured'), rows)}"
    before = TABLE.read_text("utf-8")
    TABLE.write_text(docs().between(before, "cifar10", text, "make verify"), "utf-8")


def run(folder: Path, recipe: str, *overrides: str) -> tuple[dict[str, Any], list[float]]:
    """`mptrain run` in a process of its own: its result and its losses."""
    arguments = [argument for override in overrides for argument in ("--set", override)]
    process = subprocess.run(
        [MPTRAIN, "run", ROOT / "recipes" / recipe, "--json", "--output", folder, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
        stdout=subprocess.PIPE,
        check=True,
    )
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return json.loads(process.stdout), [float(row["loss"]) for row in rows]


def test_three_epochs_reach_75_percent_in_ten_minutes(
    tmp_path: Path, shared_data: Path, table: list[tuple[str, str]]
) -> None:
    started = time.monotonic()
    result, _ = run(tmp_path / "run", "cifar10-fp32.yaml", "train.epochs=3")
    minutes = (time.monotonic() - started) / 60
    accuracy = result["metrics"]["eval"]["accuracy"]
    table.append(
        (
            "`cifar10-fp32`, 3 epochs: accuracy on the 10,000 test images",
            f"{accuracy:.2%} in {minutes:.1f} minutes, start-up included",
        )
    )
    assert accuracy >= 0.75
    assert minutes <= 10


def test_half_precision_learns_as_fp32_and_a_tiny_scale_does_not(
    tmp_path: Path, shared_data: Path, table: list[tuple[str, str]]
) -> None:
    """100 steps of batch 32 from the same seed; losses as means over 25 steps."""
    runs = {
        "fp32": ["precision.mode=fp32"],
        "bf16": ["precision.mode=bf16"],
        "fp16, dynamic scale": ["precision.mode=fp16"],
        "fp16-master": ["precision.mode=fp16-master"],
        "bf16-master": ["precision.mode=bf16-master"],
        "fp16, static scale 2^-12": [
            "precision={mode: fp16, loss_scale: {kind: static, scale: 0.000244140625}}"
        ],
    }
    common = [
        f"train={{steps: {STEPS}, global_batch_size: 32}}",
        "optim={lr: 0.01, schedule: {kind: constant}}",
        "eval.every=null",
    ]
    smoothed = {}
    for number, (name, overrides) in enumerate(runs.items()):
        _, losses = run(tmp_path / str(number), "cifar10-fp32.yaml", *common, *overrides)
        smoothed[name] = [
            sum(losses[end - WINDOW : end]) / WINDOW for end in range(WINDOW, STEPS + 1)
        ]
    exact = smoothed["fp32"]
    apart = {
        name: max(abs(a / b - 1) for a, b in zip(curve, exact, strict=True))
        for name, curve in smoothed.items()
    }
    for name, curve in smoothed.items():
        table.append(
            (
                f"CIFAR-10, {STEPS} steps of 32, {name}: mean loss of the last {WINDOW}",
                f"{curve[-1]:.3f}; at most {apart[name]:.1%} from fp32's anywhere on the curve",
            )
        )
    for name in ("bf16", "fp16, dynamic scale", "fp16-master", "bf16-master"):
        assert apart[name] <= 0.05, name
    assert smoothed["fp16, static scale 2^-12"][-1] >= 1.1 * exact[-1]
