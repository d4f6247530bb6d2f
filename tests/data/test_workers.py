"""Batches from worker processes: the same, in the same order, whatever becomes of the workers."""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcli import signals
from mpcli.data.batch import Batch
from mpcli.data.workers import BatchQueue
from mpcli.recipe.errors import Exit, Problem, UserError

CPU = torch.device("cpu")


class Numbers:
    """Batches that tell which they are, and who made them."""

    def __init__(self, act: Callable[[int], None] = lambda step: None) -> None:
        self._act = act

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        self._act(step)
        numbers = torch.full((batch_size,), 1000 * seed + step)
        maker = torch.full((batch_size,), os.getpid())
        return Batch({"numbers": numbers, "maker": maker}, (step,) * batch_size)


@contextmanager
def queue(data: Any, workers: int, num_steps: int = 100) -> Iterator[BatchQueue]:
    with BatchQueue(data, 7, 3, num_steps, CPU, workers) as made:
        yield made


def number(batch: Batch, step: int) -> int:
    """Who made the batch, which is that of the step."""
    assert batch["numbers"].tolist() == [7000 + step] * 3
    assert batch.weights == (step,) * 3
    return int(batch["maker"][0])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_batches_come_in_the_order_of_the_steps(workers: int) -> None:
    with queue(Numbers(), workers, num_steps=20) as batches:
        makers = {number(batches.batch(step), step) for step in range(5, 20)}
    if workers:
        assert os.getpid() not in makers
        assert len(makers) <= workers
    else:
        assert makers == {os.getpid()}
    assert not any(alive(maker) for maker in makers - {os.getpid()})


def test_steps_may_be_gone_back_to() -> None:
    with queue(Numbers(), 2) as batches:
        for step in (0, 1, 2, 1, 2, 3, 50, 51, 99, 0):
            number(batches.batch(step), step)


def test_batches_are_made_before_they_are_due(tmp_path: Path) -> None:
    with queue(Numbers(lambda step: (tmp_path / str(step)).touch()), 2) as batches:
        batches.batch(0)
        deadline = time.monotonic() + 60
        while not (tmp_path / "4").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not (tmp_path / "5").exists()  # and no more of them than there is use for


@pytest.mark.parametrize("killed_at", [0, 3, 9])
def test_a_worker_killed_between_batches_is_not_missed(killed_at: int) -> None:
    with queue(Numbers(), 2, num_steps=10) as batches:
        for step in range(10):
            maker = number(batches.batch(step), step)
            if step == killed_at:
                os.kill(maker, signal.SIGKILL)


def test_a_worker_killed_while_it_works_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def die_once(step: int) -> None:
        if step == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with queue(Numbers(die_once), 2) as batches:
        for step in range(10):
            number(batches.batch(step), step)
    assert (tmp_path / "died").exists()
    assert caplog.text.count("a data worker was killed") == 1


def test_workers_that_are_always_killed_end_the_run() -> None:
    def die(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with queue(Numbers(die), 2) as batches:
        for step in range(3):
            number(batches.batch(step), step)
        with pytest.raises(UserError, match="killed before it had made a batch") as caught:
            batches.batch(3)
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_signals_that_end_a_run_are_not_for_workers() -> None:
    with queue(Numbers(), 2) as batches:
        for step in range(30):
            number(batches.batch(step), step)
            workers = multiprocessing.active_children()
            for worker in workers:
                for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    os.kill(worker.pid or 0, name)
        assert len(workers) == 2
        assert multiprocessing.active_children() == workers


def test_what_a_worker_raises_is_raised_here() -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise UserError(Problem("no such record", "remove it", exit_code=Exit.ENVIRONMENT))

    with queue(Numbers(fail), 2) as batches:
        number(batches.batch(0), 0)
        number(batches.batch(1), 1)
        with pytest.raises(UserError, match="no such record") as caught:
            batches.batch(2)
    assert caught.value.problems[0].hint == "remove it"
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    found = tmp_path / "workers"
    pid = os.fork()
    if not pid:
        batches = BatchQueue(Numbers(), 7, 3, 100, CPU, 2)
        makers = {number(batches.batch(step), step) for step in range(20)}
        found.write_text(" ".join(map(str, makers)))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 60
    while any(alive(int(worker)) for worker in found.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_computes_on_one_thread_and_says_nothing(tmp_path: Path) -> None:
    def note(step: int) -> None:
        logging.getLogger("mpcli").error("step %d", step)
        (tmp_path / f"threads{step}").write_text(str(torch.get_num_threads()))

    logging.getLogger("mpcli").addHandler(handler := logging.FileHandler(tmp_path / "log"))
    try:
        with queue(Numbers(note), 1) as batches:
            number(batches.batch(0), 0)
    finally:
        logging.getLogger("mpcli").removeHandler(handler)
        handler.close()
    assert (tmp_path / "threads0").read_text() == "1"
    assert (tmp_path / "log").read_text() == ""


def test_a_signal_is_obeyed_while_a_worker_is_stopped() -> None:
    def stop(step: int) -> None:
        if step == 1:
            os.kill(os.getppid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGSTOP)

    with signals.handled(), signals.held(), queue(Numbers(stop), 1) as batches:
        number(batches.batch(0), 0)
        with pytest.raises(signals.Stopped):
            batches.batch(1)
    assert not multiprocessing.active_children()


def test_workers_that_cannot_be_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, calls = os.fork, itertools.count(1)

    def fork_once() -> int:
        if next(calls) > 1:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", fork_once)
    with queue(Numbers(), 3) as batches, pytest.raises(UserError, match="cannot be begun") as error:
        batches.batch(0)
    assert error.value.exit_code == Exit.ENVIRONMENT
    assert not multiprocessing.active_children()


def test_a_batch_that_gets_lost_is_told_with_the_reason() -> None:
    with queue(Unreadable(), 1) as batches, pytest.raises(UserError, match="EMFILE") as error:
        batches.batch(0)
    assert "its batch got lost" in str(error.value)


class Unreadable:
    def train_batch(self, seed: int, step: int, batch_size: int) -> Any:
        return NotHere()


class NotHere:
    def __reduce__(self) -> Any:
        return _not_here, ()


def _not_here() -> None:
    raise OSError(errno.EMFILE, "EMFILE")


def test_workers_leave_no_files(tmp_path: Path) -> None:
    code = (
        "import torch; from tests.data.test_workers import *\n"
        "with queue(Numbers(), 2) as batches:\n"
        "    for step in range(20): number(batches.batch(step), step)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("pymp")]


def test_a_worker_that_reads_for_ever_is_not_waited_for() -> None:
    started = time.monotonic()
    with queue(Numbers(lambda step: time.sleep(3600 if step else 0)), 2) as batches:
        batches.batch(0)
    assert time.monotonic() - started < 60
