"""`mptrain sweep loss-scale` as a process: killed, and joined, while it confirms its answer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import MPTRAIN
from tests.small import RECIPE
from tests.sweeps import done_runs, gone, wait_for

ASKED = ("fp32-seed0", "scale=256-seed0")
CONFIRMS = "recommended-seed0"


def sweep(folder: Path) -> subprocess.Popen[str]:
    """The same command every time."""
    (folder / "small.yaml").write_text(RECIPE)
    command = ["loss-scale", "small.yaml", "--set", "precision.mode=fp16", "--values", "2^8"]
    return subprocess.Popen(
        [MPTRAIN, "sweep", *command, "--steps", "150", "--output", "sweep", "--json"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_while_it_confirms_it_is_ended_by_two_others_together(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    with sweep(tmp_path) as killed:
        wait_for(folder, f"trials/{CONFIRMS}/steps.jsonl", killed)
        killed.kill()
    assert killed.returncode < 0
    assert gone(folder)
    assert not (folder / "result.json").exists()
    before = done_runs(folder)
    assert sorted(before) == sorted(ASKED)
    with sweep(tmp_path) as one, sweep(tmp_path) as other:
        ended = [process.communicate(timeout=240) for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), ended
    first, second = (json.loads(out) for out, _ in ended)
    assert first == second == json.loads((folder / "result.json").read_text())
    assert first["recommended"]["confirmed"]
    after = done_runs(folder)
    assert {name: after[name] for name in ASKED} == before
    assert sorted(after) == sorted((*ASKED, CONFIRMS))
    assert after[CONFIRMS][0] == 2  # attempts
    assert gone(folder)
