"""Runs that are killed, and disks that are full: one small case of each (see tests/verify)."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpcli.checkpoint.layout import completed
from mpcli.launch import launch
from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit
from mpcli.rundir import RunDirectory
from tests.small import CPU, Silent, run_small, small_recipe
from tests.test_resume import assert_same_run, rows
from tests.victims import (
    MODES,
    Victims,
    flipped,
    is_refused,
    loaded_steps,
    random_flips,
    recipe,
    run_into_full_disk,
    serving,
    small_disk,
    tiny_run,
    unfinished,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def whole(victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that nothing happens to."""
    return victims.finish(tmp_path_factory.mktemp("whole") / "run", *recipe())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """1 MiB."""
    try:
        with small_disk(tmp_path / "disk", 2**20) as path:
            yield path
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("mode", MODES)
def test_killed_when_a_row_is_there_it_ends_the_same(
    victims: Victims, whole: RunDirectory, tmp_path: Path, mode: str
) -> None:
    for step in (2, 8, 11):
        victim = victims.start(tmp_path / f"{step}", *recipe(), *MODES[mode], pace=0.05)
        assert victim.wait_until(victim.shows, step)
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
        assert not victim.run.final_path.exists()
        assert_same_run(victims.finish(victim.run.path), whole)


@pytest.mark.parametrize("mode", MODES)
def test_killed_while_checkpoints_are_written_it_ends_the_same(
    victims: Victims, whole: RunDirectory, tmp_path: Path, mode: str
) -> None:
    killed_in_a_save = 0
    for step in (3, 6, 9):
        victim = victims.start(tmp_path / "run", *recipe(), *MODES[mode], pace=0.01)
        assert victim.wait_until(victim.is_saving, step)
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
        killed_in_a_save += bool(unfinished(victim.run))
        assert len(loaded_steps(victim.run)) >= min(step // 3 - 1, 2)
    assert killed_in_a_save > 0
    assert_same_run(victims.finish(tmp_path / "run"), whole)


def test_no_damage_to_a_checkpoint_of_a_run_is_silent(whole: RunDirectory, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.checkpoints_path, tmp_path / "checkpoints")
    newest = completed(folder)[0].path
    for name, bit in random_flips(newest, 50, seed=0):
        with flipped(newest / name, bit):
            assert is_refused(folder), (name, bit)
    assert not is_refused(folder)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("leave", [0, 2**16], ids=["no byte left", "room for the result"])
def test_a_disk_that_fills_up_costs_the_steps_since_the_last_checkpoint(
    victims: Victims, whole: RunDirectory, disk: Path, leave: int, mode: str
) -> None:
    run, other = run_into_full_disk(victims, disk, *recipe(), *MODES[mode], leave=leave)
    result = run.result()
    assert (result is not None) == (leave > 0)
    if result:
        assert (result.status, result.exit_code) == ("failed", Exit.STORAGE)
        assert "No space left on device" in (result.reason or "")
        assert result.checkpoint == "checkpoints/step-3"
    other.unlink()
    assert_same_run(victims.finish(run.path), whole)


def test_a_disk_without_room_for_the_checkpoints_ends_the_run_before_step_1(
    tmp_path: Path, disk: Path
) -> None:
    run, result = run_small(tmp_path, *recipe(), "task.model.width=24", name=str(disk / "run"))
    assert (result.status, result.exit_code, result.steps_attempted) == ("failed", Exit.STORAGE, 0)
    assert not (run.path / "steps.jsonl").exists()
    told = re.search(r"need ([\d,]+) bytes, and ([\d,]+) are free", result.reason or "")
    assert told
    needed, free = (int(number.replace(",", "")) for number in told.groups())
    assert free < 2**20 < needed


def test_records_that_have_no_room_cost_no_step(tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path, "train.steps=100", "output.checkpoint_every=20 steps")
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, tmp_path / "run")
    with only_disk_of(run.path / "steps.jsonl", 2**14):
        result = launch(run, Silent())
        kept = [row["step"] for row in rows(run)]
    assert (result.status, result.exit_code, result.steps_attempted) == ("done", 0, 100)
    (problem,) = result.problems
    assert problem["severity"] == "warning"
    assert "No space left on device" in problem["message"]
    assert run.log_path.read_text().count("WARNING") == 1
    assert kept == list(range(1, len(kept) + 1))  # whole rows, as long as there was room
    assert 0 < len(kept) < 100
    assert loaded_steps(run) == [100, 80]


@contextlib.contextmanager
def only_disk_of(file: Path, size: int) -> Iterator[None]:
    """Let one file lie on a disk of its own."""
    try:
        with small_disk(file.parent.with_name("disk-of-one-file"), size) as path:
            for one in (path / file.name, file):
                one.touch()
            subprocess.run(["mount", "--bind", path / file.name, file], check=True)
            try:
                yield
            finally:
                subprocess.run(["umount", file], check=True)
    except PermissionError as error:
        pytest.skip(str(error))


def test_3000_steps_take_no_more_memory_than_500(tmp_path: Path) -> None:
    found = tiny_run(tmp_path, 3000)
    assert [row["step"] for row in found] == list(range(1, 3001))
    grown = found[-1]["memory_allocated_bytes"] - found[499]["memory_allocated_bytes"]
    assert grown < 20e6 * 2500 / 18000
