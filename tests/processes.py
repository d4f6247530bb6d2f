"""Runs in real processes, and signals to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

MPTRAIN = Path(sys.executable).with_name("mptrain")
ENDLESS = ("--set", "train.steps=100000", "--set", "output.checkpoint_every=40 steps")

_BEGIN = """
import sys
from mpcli.cli import main
{patch}
sys.exit(main())
"""

# Ways to be found in the middle of something: the file `there` says so, and it takes a while.
_SLOW = """
import time
from pathlib import Path
def slowly(take_time):
    def call(*arguments, **options):
        Path("there").touch()
        return take_time(*arguments, **options)
    return call
"""
SLOW_EVALUATION = f"""{_SLOW}
from mpcli.tasks import image_classification as task
def take_long(options, model, batches):
    return {{"loss": sum(time.sleep(0.3) or 1.0 for _ in batches)}}
task.evaluate = slowly(take_long)
"""
STUCK_EVALUATION = f"""{_SLOW}
from mpcli.tasks import image_classification as task
task.evaluate = slowly(lambda *_: time.sleep(600))
"""
SLOW_SAVING = f"""{_SLOW}
from mpcli.checkpoint import saver
save = saver.save
saver.save = slowly(lambda *a, **o: time.sleep(1) or save(*a, **o))
"""


def started(*arguments: str | Path, patch: str = "") -> subprocess.Popen[str]:
    """`mptrain run ... --json` in a process of its own, as soon as it handles signals."""
    process = subprocess.Popen(
        [sys.executable, "-c", _BEGIN.format(patch=patch), "run", *arguments, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")
    wanted = 1 << (signal.SIGUSR1 - 1)
    wait_until(lambda: _caught(status.read_text()) & wanted != 0, process)
    return process


def _caught(status: str) -> int:
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return int(mask, 16)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that the process does."""
    while not happened():
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.01)


def has_row(path: Path, step: int) -> bool:
    """Whether a step's row is in a `steps.jsonl`, which may not exist yet."""
    return path.exists() and f'{{"step": {step},' in path.read_text()


def wait_for_step(path: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the row of a step is in the file."""
    wait_until(lambda: has_row(path, step), process)


def ended(
    process: subprocess.Popen[str], number: int, seconds: float = 10
) -> tuple[int, dict[str, object], str]:
    """Exit code, the JSON and stderr of a process that gets a signal now."""
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < seconds
    assert "Traceback" not in err
    return process.returncode, json.loads(out) if out else {}, err


CODES = {signal.SIGTERM: (75, "preempted"), signal.SIGINT: (130, "interrupted")}


def in_training(recipe: Path, number: int) -> None:
    """A signal in training leaves a checkpoint of the last step, and the run can go on."""
    process = started(recipe, *ENDLESS, "--output", "out")
    wait_for_step(Path("out/steps.jsonl"), 50, process)
    returned, told, _ = ended(process, number)
    assert (returned, told["status"]) == CODES[number]
    assert told == json.loads(Path("out/result.json").read_text())
    steps = told["steps_attempted"]
    assert isinstance(steps, int)
    assert told["checkpoint"] == f"checkpoints/step-{steps}"
    assert len(Path("out/steps.jsonl").read_text().splitlines()) == steps
    resumed = subprocess.run(
        [MPTRAIN, "run", "--resume", "out", "--set", f"train.steps={steps + 3}", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(resumed.stdout)["steps_attempted"] == steps + 3, resumed.stderr


def to_the_whole_group(recipe: Path, number: int) -> None:
    """Batch systems, terminals: data workers go on until the run has ended, and no longer."""
    workers = ("--set", "engine.data_workers=2")
    process = started(recipe, *ENDLESS, *workers, "--output", "out")
    wait_for_step(Path("out/steps.jsonl"), 50, process)
    (children,) = Path(f"/proc/{process.pid}/task").glob(f"{process.pid}/children")
    made = children.read_text().split()
    assert len(made) == 2
    os.killpg(process.pid, number)
    returned, told, _ = ended(process, number=0)
    assert (returned, told["status"]) == CODES[number]
    assert isinstance(told["problems"], list)
    assert len(told["problems"]) == 1  # which says that it was stopped
    assert not any(Path("/proc", worker).exists() for worker in made)


def in_evaluation(recipe: Path, number: int) -> None:
    """An evaluation, which would go on for hours, ends; the checkpoint is of the step before it."""
    slow = ("--set", "eval.every=3 steps", "--set", "train.micro_batch_size=1")
    process = started(recipe, *ENDLESS, *slow, "--output", "out", patch=SLOW_EVALUATION)
    wait_until(Path("there").exists, process)
    returned, told, _ = ended(process, number)
    assert (returned, told["status"]) == CODES[number]
    assert told["checkpoint"] == "checkpoints/step-3"


def in_saving(recipe: Path, number: int, *, background: bool = False) -> None:
    """A save that has begun is finished, and one of the last step is there."""
    how = ("--set", f"output.async_checkpoint={str(background).lower()}")
    process = started(recipe, *ENDLESS, *how, "--output", "out", patch=SLOW_SAVING)
    wait_until(Path("there").exists, process)
    returned, told, _ = ended(process, number)
    assert (returned, told["status"]) == CODES[number]
    assert told["checkpoint"] == f"checkpoints/step-{told['steps_attempted']}"
    assert Path("out", str(told["checkpoint"]), "manifest.json").exists()
    assert not list(Path("out").glob("checkpoints/*.tmp"))


def in_saving_in_the_background(recipe: Path, number: int) -> None:
    """The same with `output.async_checkpoint`."""
    in_saving(recipe, number, background=True)


def second_ctrl_c(recipe: Path, number: int) -> None:
    """The first Ctrl-C (or SIGTERM) waits for an evaluation that is stuck, the second does not."""
    stuck = ("--set", "eval.every=3 steps")
    process = started(recipe, *ENDLESS, *stuck, "--output", "out", patch=STUCK_EVALUATION)
    wait_until(Path("there").exists, process)
    process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None
    returned, told, _ = ended(process, signal.SIGINT, seconds=5)
    assert (returned, told["status"]) == (130, "interrupted")


def sigusr1(recipe: Path, number: int) -> None:
    """SIGUSR1 saves, also when it came during the start, and the run goes on."""
    never = (
        "--set",
        "train.steps=100000",
        "--set",
        "output={checkpoint_every: null, keep_last: 9}",
    )
    process = started(recipe, *never, "--output", "out")
    process.send_signal(signal.SIGUSR1)
    wait_until(Path("out/checkpoints/step-1").exists, process)
    wait_for_step(Path("out/steps.jsonl"), 50, process)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(list(Path("out").glob("checkpoints/step-*[0-9]"))) > 1, process)
    (saved,) = {int(path.name[5:]) for path in Path("out").glob("checkpoints/step-*[0-9]")} - {1}
    wait_for_step(Path("out/steps.jsonl"), saved + 50, process)
    assert ended(process, number)[0] == CODES[number][0]


def in_the_start(recipe: Path, number: int, moments: tuple[float, ...] = (0.05, 1, 2.5)) -> None:
    """At any moment of the start, before and after there is a run directory."""
    for seconds in moments:
        process = started(recipe, *ENDLESS)
        time.sleep(seconds)
        code, told, err = ended(process, number)
        assert (code, told["status"]) == CODES[number], (seconds, err)


def in_the_whole_start(recipe: Path, number: int) -> None:
    """The same at more moments."""
    in_the_start(recipe, number, (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2, 3, 4, 6))


def killed(recipe: Path, number: int) -> None:
    """SIGKILL, and another process that is refused before it; the end is that of a whole run."""
    length = ("--set", "train.steps=60", "--set", "output.checkpoint_every=20 steps")
    assert subprocess.run([MPTRAIN, "run", recipe, *length, "--output", "whole"]).returncode == 0
    process = started(recipe, *length, "--output", "out")
    wait_for_step(Path("out/steps.jsonl"), 30, process)
    os.kill(process.pid, signal.SIGSTOP)  # alive, and holding the lock
    second = subprocess.run([MPTRAIN, "run", "--resume", "out"], capture_output=True, text=True)
    assert second.returncode == 2
    assert f"another process ({process.pid}) writes to this run" in second.stderr
    process.send_signal(number)
    process.communicate()
    resumed = subprocess.run([MPTRAIN, "run", "--resume", "out"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    final = "final/model.safetensors"
    assert Path("out", final).read_bytes() == Path("whole", final).read_bytes()


BOTH = (signal.SIGTERM, signal.SIGINT)
CASES = [
    *((case, number) for case in (in_training, in_evaluation, in_saving) for number in BOTH),
    (in_saving_in_the_background, signal.SIGTERM),
    *((to_the_whole_group, number) for number in BOTH),
    *((second_ctrl_c, number) for number in BOTH),
    (sigusr1, signal.SIGTERM),
    *((in_the_start, number) for number in BOTH),
    (killed, signal.SIGKILL),
]


# What the processes of a group do otherwise than they should, by Python's own hook.
_HOOK = """
import os, time
if "RANK" in os.environ:
    from mpcli.rundir import RunDirectory
    rank, at_step = int(os.environ["RANK"]), RunDirectory.at_step
    def hooked(run, step):
        at_step(run, step)
{body}
    RunDirectory.at_step = hooked
{patch}
"""
PACED = "        time.sleep(0.05)"
"""A step takes long enough to do something to it."""


class Several:
    """A command whose processes train together, and all processes that come of it.

    Args:
        command: before `run`; the launcher's by default.
        hook: statements of a rank at every step.
        stdout, stderr: of the command.
        patch: statements of a rank before it begins.
        variables: of the environment.
    """

    def __init__(
        self,
        *arguments: str | Path,
        command: Sequence[str] = (sys.executable, "-m", "mpcli"),
        hook: str = PACED,
        stdout: IO[str] | int = subprocess.PIPE,
        stderr: IO[str] | int = subprocess.PIPE,
        patch: str = "",
        **variables: str,
    ) -> None:
        self.mark = f"MPTRAIN_TEST={uuid.uuid4()}"
        folder = Path(f"hook-{self.mark[13:]}").absolute()
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_HOOK.format(body=hook, patch=patch))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        path = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [*command, "run", *map(str, arguments)],
            stdout=stdout,
            stderr=stderr,
            text=True,
            process_group=0,
            env={**inherited, "PYTHONPATH": path, name: value, **variables},
        )

    def in_step(self, rank: int, step: int, attempt: int = 1) -> int:
        """Wait until a rank is in a step; its process id."""
        path = Path(f"out/attempts/{attempt}/rank{rank}.json")

        def reached() -> bool:
            return (
                path.exists() and int(json.loads(path.read_text() or '{"step": 0}')["step"]) >= step
            )

        wait_until(reached, self.process)
        return int(json.loads(path.read_text())["pid"])

    def ended(self, seconds: float = 120) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, when it has ended and left no process behind."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            left = self.left()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
        assert not left
        return self.process.returncode, out, err

    def left(self, seconds: float = 3) -> list[int]:
        """Processes that are there though they have had time to end."""
        end = time.monotonic() + seconds
        while (found := list(self._processes())) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def _processes(self) -> Iterator[int]:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes():
                    yield int(folder.name)
