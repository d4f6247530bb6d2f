"""A sweep that is killed, and started again: no finished trial is repeated, and none is lost."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.sweeps import CELLS, complete, done_runs, finished, gone, study_of, sweeping, wait_for


def kill_and_start_again(folder: Path, moments: list[tuple[int, float]]) -> None:
    """Kill a sweep with two jobs at some moments, each after so many runs have begun and seconds.

    Nothing that it has started outlives it. Then let it end, and look at what was done.
    """
    before: dict[str, tuple[int, bytes]] = {}
    for begun, seconds in moments:
        with sweeping(folder, "train.steps=300") as process:
            wait_for(folder, "trials/*/recipe.yaml", process, begun)
            time.sleep(seconds)
        assert gone(folder)
        now = done_runs(folder)
        assert before.items() <= now.items()
        before = now
    with sweeping(folder, "train.steps=300") as process:
        trials = finished(process)
    now = done_runs(folder)
    assert before.items() <= now.items(), "a finished trial was run again"
    assert sorted(now) == sorted(cell.name for cell in CELLS)
    study = study_of(folder)
    assert complete(study) == sorted(now)  # each told once
    assert [trial["run"] for trial in trials] == [cell.name for cell in CELLS]
    assert {(trial["status"], trial["steps"]) for trial in trials} == {("done", 300)}


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    seconds = random.uniform(0, 3)
    print(f"killed {seconds:.2f} s after it had begun a run")  # noqa: T201
    kill_and_start_again(tmp_path / "sweep", [(1, seconds)])


@pytest.mark.verify
@pytest.mark.parametrize("seed", range(10))
def test_a_sweep_killed_at_random_moments(tmp_path: Path, seed: int) -> None:
    """Each of ten sweeps: two of them in their start, the others in or between their trials."""
    draw = random.Random(seed)
    if seed < 2:
        moments = [(0, draw.uniform(0, 5))]
    else:
        moments = [(draw.randint(1, len(CELLS)), draw.uniform(0, 3)) for _ in range(1 + seed % 2)]
    kill_and_start_again(tmp_path / "sweep", moments)
