"""Hundreds of kills, flipped bits and full disks (`make verify`); see docs/verification.md."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpcli import checkpoint
from mpcli.checkpoint.layout import completed
from mpcli.recipe.errors import Exit
from mpcli.rundir import RunDirectory
from tests.checkpoints import FILES
from tests.processes import MPTRAIN, has_row
from tests.small import RECIPE as SMALL
from tests.stopped import assert_same_run
from tests.verify.page import Rows, write
from tests.victims import (
    ENVIRONMENT,
    MODES,
    STEPS,
    Victims,
    flipped,
    is_refused,
    loaded_steps,
    mptrain,
    random_flips,
    recipe,
    run_into_full_disk,
    sets,
    small_disk,
    truncated,
    unfinished,
)

pytestmark = pytest.mark.verify
KILLS = 60  # in each mode
FLIPS = 1000
MIB = 2**20


@pytest.fixture(scope="module")
def measured() -> Iterator[Rows]:
    rows: Rows = []
    yield rows
    write("survival", rows)


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_step(
    victims: Victims, whole: RunDirectory, tmp_path: Path, measured: Rows, mode: str
) -> None:
    killed_at = []
    for step in range(1, STEPS + 1):
        victim = victims.start(tmp_path / f"{step}", *recipe(), *MODES[mode], pace=0.05)
        assert victim.wait_until(victim.shows, step)
        victim.kill()
        if victim.wait() == -signal.SIGKILL:
            killed_at.append(step)
        assert_same_run(victims.finish(victim.run.path), whole)
    assert killed_at[: STEPS - 1] == list(range(1, STEPS))  # after the last it may have ended
    measured.append(
        (
            f"SIGKILL as soon as `steps.jsonl` shows step 1, 2, ... {STEPS}; fp16, accumulation "
            f"2, {mode} saves",
            f"{len(killed_at)} killed, {STEPS} end states equal",
        )
    )


@pytest.mark.parametrize("mode", MODES)
def test_killed_while_checkpoints_are_written(
    victims: Victims, tmp_path: Path, measured: Rows, mode: str
) -> None:
    """A save after every step, which leaves one checkpoint; one to three kills a run."""
    overrides = (*recipe(save_every=1, keep_last=1), *MODES[mode])
    whole = victims.finish(tmp_path / "whole", *overrides)
    seconds = seconds_of_a_save(whole, tmp_path / "rehearsal")
    generator = random.Random(0)
    runs = kills = killed_in_a_save = 0
    while kills < KILLS:
        path = tmp_path / f"{runs}"
        newest = 0
        for _ in range(generator.randint(1, 3)):
            if newest == STEPS:
                break
            step = generator.randint(newest + 1, STEPS)
            victim = victims.start(path, *overrides)
            assert victim.wait_until(victim.is_saving, step)
            time.sleep(generator.uniform(0, 2 * seconds))
            victim.kill()
            kills += victim.wait() == -signal.SIGKILL
            killed_in_a_save += bool(unfinished(victim.run))
            loaded = loaded_steps(victim.run)
            assert loaded or step == 1
            newest = max(loaded, default=0)
        run = victims.finish(path)
        assert_same_run(run, whole)
        warnings = {problem["message"] for problem in run.result().problems}  # type: ignore[union-attr]
        assert warnings <= {"the run has no checkpoint yet: it begins again"}
        runs += 1
    assert killed_in_a_save >= KILLS / 5
    measured.append(
        (
            f"SIGKILL at random moments while checkpoints are written, {mode} saves",
            f"{kills} kills in {runs} runs, {killed_in_a_save} of them left a save unfinished; "
            f"0 checkpoints unloadable, {runs} end states equal",
        )
    )


def seconds_of_a_save(run: RunDirectory, folder: Path) -> float:
    """What the last checkpoint of a run takes to be saved."""
    tensors, state = checkpoint.load(completed(run.checkpoints_path)[0])
    folder.mkdir()
    started = time.monotonic()
    for step in range(10):
        checkpoint.save(folder / "checkpoints", step, tensors, state, keep_last=1)
    return (time.monotonic() - started) / 10


def test_the_command_line_is_killed(tmp_path: Path, measured: Rows) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    arguments = ["run", "small.yaml", *sets(recipe(steps=60)), "--output"]
    mptrain(*arguments, "whole", folder=tmp_path)
    for step in (5, 21, 47):
        run = RunDirectory(tmp_path / f"{step}")
        process = subprocess.Popen([MPTRAIN, *arguments, run.path], cwd=tmp_path, env=ENVIRONMENT)
        while not has_row(run.path / "steps.jsonl", step):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        mptrain("run", "--resume", str(run.path), folder=tmp_path)
        assert_same_run(run, RunDirectory(tmp_path / "whole"))
    measured.append(
        ("`mptrain run`, `kill -9`, `mptrain run --resume`", "3 killed, 3 end states equal")
    )


def test_flipped_bits_and_truncated_files(
    whole: RunDirectory, tmp_path: Path, measured: Rows
) -> None:
    folder = shutil.copytree(whole.checkpoints_path, tmp_path / "checkpoints")
    newest = completed(folder)[0].path
    silent = []
    for name, bit in random_flips(newest, FLIPS, seed=0):
        with flipped(newest / name, bit):
            if not is_refused(folder):
                silent.append((name, bit))
    assert silent == []
    for name in FILES:
        size = (newest / name).stat().st_size
        for tenth in range(10):
            with truncated(newest / name, size * tenth // 10):
                assert is_refused(folder), (name, tenth)
    assert not is_refused(folder)
    measured.append(
        (
            "A checkpoint of that run: bits flipped, files truncated",
            f"{FLIPS} flips and {10 * len(FILES)} truncations, 0 silent; the checkpoint before it "
            "used each time",
        )
    )


@pytest.mark.parametrize("leave", [0, 2**16], ids=["no byte left", "room for the result"])
@pytest.mark.parametrize(("size", "width", "batch"), [(MIB, 4, 150), (64 * MIB, 24, 16)])
@pytest.mark.parametrize("mode", MODES)
def test_a_disk_fills_up(
    victims: Victims,
    tmp_path: Path,
    measured: Rows,
    mode: str,
    size: int,
    width: int,
    batch: int,
    leave: int,
) -> None:
    overrides = (*recipe(batch=batch), *MODES[mode], f"task.model.width={width}")
    whole = victims.finish(tmp_path / "whole", *overrides)
    try:
        with small_disk(tmp_path / "disk", size) as disk:
            run, other = run_into_full_disk(victims, disk, *overrides, leave=leave)
            result = run.result()
            assert (result is not None) == (leave > 0)
            if result:
                assert (result.status, result.exit_code) == ("failed", Exit.STORAGE)
                assert "No space left on device" in (result.reason or "")
            other.unlink()
            assert_same_run(victims.finish(run.path), whole)
    except PermissionError as error:
        pytest.skip(str(error))
    measured.append(
        (
            f"A disk of {size // MIB} MiB fills up but for {leave:,} bytes after step 3, "
            f"{mode} saves",
            "exit 7, the checkpoint of step 3 intact; resumed with room, the end state is equal",
        )
    )
