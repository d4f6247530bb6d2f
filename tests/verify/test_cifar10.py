"""The long proofs on real CIFAR-10 (`make verify`); their table is docs/verification.md."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.verify.page import Rows, machine, run, write

pytestmark = pytest.mark.verify
STEPS, WINDOW = 100, 25


@pytest.fixture(scope="module")
def table() -> Iterator[Rows]:
    rows: Rows = []
    yield rows
    write("cifar10", rows, machine())


def test_three_epochs_reach_75_percent_in_ten_minutes(
    tmp_path: Path, shared_data: Path, table: Rows
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
    tmp_path: Path, shared_data: Path, table: Rows
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
