"""The report of a real CIFAR-10 run with a skip, a resume and a finding, in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.processes import MPTRAIN
from tests.report.conftest import chromium, opened
from tests.report.test_browser import check_keyboard, check_page
from tests.verify.page import ROOT, run

pytestmark = pytest.mark.verify
__all__ = ["chromium", "opened"]  # fixtures
STORM = "precision.loss_scale={kind: dynamic, init_scale: 1048576, growth_interval: 1}"


def test_cifar10_with_a_skip_a_resume_and_a_finding(
    tmp_path: Path, shared_data: Path, opened: Any
) -> None:
    # An evaluation on all 10,000 test images would take minutes: fp16 is slow on CPUs.
    for name, images in {"train": 5000, "test": 200}.items():
        table = pq.read_table(shared_data / "cifar10" / f"{name}.parquet")
        pq.write_table(table.slice(0, images), tmp_path / f"{name}.parquet")
    folder = tmp_path / "cifar10"
    settings = [
        "train={steps: 16, global_batch_size: 32}", "eval.every=8 steps", "probe.every=4",
        "output.checkpoint_every=8 steps", STORM, f"data.path={tmp_path}",
    ]  # fmt: skip
    run(folder, "cifar10-fp16.yaml", *settings)
    subprocess.run([MPTRAIN, "run", "--resume", folder, "--set", "train.steps=24"], check=True)
    with (tmp_path / "diagnosis.json").open("w") as file:
        command = [MPTRAIN, "diagnose", "--no-replay", "--json", folder]
        subprocess.run(command, check=True, stdout=file)
    shutil.copy(tmp_path / "diagnosis.json", folder)
    page = tmp_path / "report.html"
    subprocess.run([MPTRAIN, "report", folder, "-o", page], check=True)
    for width, scheme in ((1600, "light"), (1600, "dark"), (800, "light"), (800, "dark")):
        shown = opened(page, width, scheme)
        check_page(shown, page)
        check_keyboard(shown.page)
        shown.page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    assert ROOT not in page.parents
