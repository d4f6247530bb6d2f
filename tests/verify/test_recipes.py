"""The other shipped recipes that are not for fp16, on this CPU (`make verify`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_cifar import write_tiny_cifar
from tests.verify.page import Rows, machine, run, write

pytestmark = pytest.mark.verify
IMAGES = 50_000


@pytest.fixture(scope="module")
def table() -> Iterator[Rows]:
    rows: Rows = []
    yield rows
    write("recipes", rows, machine())


@pytest.mark.parametrize("recipe", ["digits-fp32", "digits-bf16"])
def test_digits_reach_98_percent(tmp_path: Path, table: Rows, recipe: str) -> None:
    result, _ = run(tmp_path / "run", f"{recipe}.yaml")
    accuracy = result["metrics"]["eval"]["accuracy"]
    table.append(
        (f"`{recipe}`: accuracy", f"{accuracy:.2%} in {result['wall_seconds']:.0f} seconds")
    )
    assert accuracy >= 0.98


@pytest.mark.parametrize(
    "recipe", ["cifar10-bf16", "cifar10-bf16-master", "cifar10-vit", "cifar10-resnet18"]
)
def test_how_long_an_epoch_would_take(tmp_path: Path, table: Rows, recipe: str) -> None:
    """Products in bf16 are slow on CPUs without instructions for them: four steps, no training.

    On images like CIFAR's: the 10,000 test images would take an hour.
    """
    write_tiny_cifar(tmp_path / "data")
    few = (f"data.path={tmp_path / 'data'}", "train={steps: 4, global_batch_size: 16}")
    _, losses = run(tmp_path / "run", f"{recipe}.yaml", *few)
    rows = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    rate = json.loads(rows[-1])["samples_per_second"]
    table.append(
        (
            f"`{recipe}`: images per second of training in batches of 16",
            f"{rate:.0f}: {IMAGES / rate / 60:.0f} minutes an epoch; not trained here",
        )
    )
    assert all(math.isfinite(loss) for loss in losses)
