"""Runs to be killed, disks to be filled, checkpoints to be damaged.

A server that has everything imported forks one run after another, so that each costs half a second.
`python -m tests.victims` is the server. It reads an order (JSON) from stdin, forks, and prints the
child's process id; after the next line it waits for the child's end and prints how it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # which a run would import
from torch import nn

from mpcli import checkpoint, outcomes
from mpcli.checkpoint.layout import completed
from mpcli.data.images import ImageInfo
from mpcli.engines.local import LocalEngine
from mpcli.recipe.errors import Exit, UserError
from mpcli.rundir import RunDirectory
from mpcli.tasks import image_classification as task
from tests.checkpoints import FILES
from tests.processes import MPTRAIN, has_row
from tests.small import RECIPE as SMALL
from tests.small import resume_small, run_small

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STEPS = 12
MODES = {"synchronous": (), "asynchronous": ("output.async_checkpoint=true",)}


def recipe(
    *, steps: int = STEPS, batch: int = 150, save_every: int = 3, keep_last: int = 2
) -> tuple[str, ...]:
    """Overrides of the small recipe that make it hold all kinds of state.

    An epoch's end (batches of 150: after step 9), accumulation, skipped steps, a scale that falls
    and grows, moments, an average of the weights, a schedule. The victims' model has dropout too.
    """
    return (
        f"train={{steps: {steps}, global_batch_size: {batch}, micro_batch_size: {batch // 2}, "
        "ema: 0.9}",
        "precision={mode: fp16, loss_scale: "
        "{kind: dynamic, init_scale: 4194304, hysteresis: 2, growth_interval: 3}}",
        "optim={kind: adamw, lr: 0.01, schedule: {kind: cosine, warmup: 0.2}}",
        "eval.every=5 steps",
        f"output={{checkpoint_every: {save_every} steps, keep_last: {keep_last}, keep_best: loss}}",
    )


class Victim:
    """A forked run. It is not reaped before `wait`, so signals cannot reach another process."""

    def __init__(self, server: subprocess.Popen[str], run: RunDirectory) -> None:
        assert server.stdin
        assert server.stdout
        self.run = run
        self._orders, self._answers = server.stdin, server.stdout
        self._process = os.pidfd_open(int(self._answers.readline()))

    def wait_until(self, condition: Callable[[int], bool], step: int) -> bool:
        """Whether `condition(step)` came true before the process ended."""
        while not condition(step):
            if select.select([self._process], [], [], 0.0005)[0]:
                return False
        return True

    def shows(self, step: int) -> bool:
        """Whether a step's row is in `steps.jsonl`."""
        return has_row(self.run.path / "steps.jsonl", step)

    def has_saved(self, step: int) -> bool:
        """Whether there is a checkpoint of that step."""
        return (self.run.checkpoints_path / f"step-{step}").exists()

    def is_saving(self, step: int) -> bool:
        """Whether the checkpoint of that step is being written, or was."""
        return self.has_saved(step) or (self.run.checkpoints_path / f"step-{step}.tmp").exists()

    def kill(self) -> None:
        """SIGKILL; the process may have ended before."""
        signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def wait(self) -> int:
        """Exit code, or minus the number of the signal that ended it."""
        self._orders.write("wait\n")
        self._orders.flush()
        os.close(self._process)
        return int(self._answers.readline())


class Victims:
    """The server; one victim at a time."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, path: Path, *overrides: str, pace: float = 0.0) -> Victim:
        """Begin a run, or go on with the run that is there.

        Args:
            path: of the run directory.
            pace: seconds that every step takes longer, with its row in the file before the next.
        """
        order = {"path": str(path), "overrides": overrides, "pace": pace}
        assert self._server.stdin
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return Victim(self._server, RunDirectory(path))

    def finish(self, path: Path, *overrides: str) -> RunDirectory:
        """Bring a run to its end, from the beginning or from where it was stopped."""
        victim = self.start(path, *overrides)
        assert victim.wait() == 0
        return victim.run


@contextlib.contextmanager
def serving() -> Iterator[Victims]:
    """A server for a block."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.victims"],
        cwd=ROOT, env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as server:  # fmt: skip
        yield Victims(server)


def loaded_steps(run: RunDirectory) -> list[int]:
    """Steps of all checkpoints, newest first, after each of them was loaded. Changes nothing."""
    found = completed(run.checkpoints_path)
    assert [checkpoint.load(one)[1]["attempted"] for one in found] == [one.step for one in found]
    return [one.step for one in found]


def unfinished(run: RunDirectory) -> list[str]:
    """What a save that was killed left behind."""
    return [path.name for path in run.checkpoints_path.glob("step-*.*")]


def is_refused(folder: Path) -> bool:
    """Whether the newest checkpoint is refused, and the one before it used with a warning."""
    newest, before, *_ = completed(folder)
    try:
        checkpoint.verify(newest)
    except UserError as error:
        assert error.exit_code == Exit.CHECKPOINT
        found, warnings = checkpoint.newest_valid(folder)
        return found == before and len(warnings) == 1
    return False


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """A file with one bit flipped."""
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(bit // 8)
        file.write(bytes([content[bit // 8] ^ 1 << bit % 8]))
    yield
    path.write_bytes(content)


@contextlib.contextmanager
def truncated(path: Path, size: int) -> Iterator[None]:
    """A file with only its first bytes."""
    content = path.read_bytes()
    os.truncate(path, size)
    yield
    path.write_bytes(content)


def random_flips(folder: Path, number: int, seed: int) -> Iterator[tuple[str, int]]:
    """(name, bit) of a checkpoint's files: each file as often, and each of its bits."""
    generator = random.Random(seed)
    for _ in range(number):
        name = generator.choice(FILES)
        yield name, generator.randrange(8 * (folder / name).stat().st_size)


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes; PermissionError where none may be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("may not mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """A file that takes all room but `leave` bytes."""
    other, state = disk / "other", os.statvfs(disk)
    with other.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - leave)
    return other


def run_into_full_disk(
    victims: Victims, disk: Path, *overrides: str, leave: int
) -> tuple[RunDirectory, Path]:
    """A run whose disk fills up after step 3, and the file that fills it."""
    victim = victims.start(disk / "run", *overrides, pace=0.05)
    assert victim.wait_until(victim.has_saved, 3)
    assert victim.wait_until(victim.shows, 3)
    other = fill(disk, leave=leave)
    assert victim.wait() == Exit.STORAGE
    assert loaded_steps(victim.run) == [3]
    assert not unfinished(victim.run)
    return victim.run, other


def tiny_run(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of `mptrain run` with many steps of a model of some hundred parameters."""
    (folder / "tiny.yaml").write_text(SMALL)
    overrides = (
        "task.model.width=1",
        f"train={{steps: {steps}, global_batch_size: 8}}",
        "output.checkpoint_every=5000 steps",
    )
    mptrain("run", "tiny.yaml", *sets(overrides), "--output", "run", folder=folder)
    return [json.loads(row) for row in (folder / "run/steps.jsonl").read_text().splitlines()]


def sets(overrides: Iterable[str]) -> list[str]:
    """The command line's words for overrides."""
    return [word for override in overrides for word in ("--set", override)]


def mptrain(*arguments: str, folder: Path) -> None:
    """The real command line, in a folder, to a good end."""
    command = [MPTRAIN, *arguments]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def serve() -> None:
    """Fork a victim for each order."""
    build_model = task.build_model

    def with_dropout(options: Any, info: ImageInfo) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.2), build_model(options, info))

    task.build_model = with_dropout
    threads = _threads()  # of the libraries, idle
    while order := sys.stdin.readline():
        assert _threads() == threads, "a fork loses every thread but one"
        child = os.fork()
        if not child:
            os._exit(_live(**json.loads(order)))
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def _threads() -> list[str]:
    return [path.name for path in Path("/proc/self/task").iterdir()]


def _live(path: str, overrides: list[str], pace: float) -> int:
    """A victim's life; its exit code."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if pace:
        _slow_down(pace)
    run = RunDirectory(Path(path))
    try:
        if run.recipe_path.exists():
            return resume_small(run).exit_code
        return run_small(run.path.parent, *overrides, name=run.path.name)[1].exit_code
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1


def _slow_down(pace: float) -> None:
    step = LocalEngine.step

    def slow(engine: LocalEngine) -> Any:
        time.sleep(pace)
        return step(engine)

    LocalEngine.step = slow  # type: ignore[method-assign]
    outcomes.BLOCK = 1


if __name__ == "__main__":
    serve()
