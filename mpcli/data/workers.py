"""The batches of the training steps, in their order, from worker processes where there are any."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.util
import os
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NoReturn, Protocol

import torch

from mpcli.data.batch import Batch
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.signals import blocked, check

_log = logging.getLogger(__name__)
_AHEAD = 2  # batches that each worker is asked for before they are due
_LOOK = 0.2  # seconds between two looks at the signals, while a batch is waited for


class TrainBatches(Protocol):
    """The part of a data set that workers need."""

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """A function of the arguments alone: whichever process computes it."""


class BatchQueue:
    """Training batches, made when they are due or ahead of that by worker processes.

    Workers are forked, so nothing of the data set is copied. They never see the signals that end
    a run, which are for the process that trains; they end with it, however it ends. When one is
    killed all are begun again with the batch that is due.

    Args:
        data: with workers, on the CPU.
        seed: of the run.
        batch_size: samples of a global batch.
        num_steps: of the run: no batch is made for later ones.
        device: where the batches are wanted.
        workers: processes; 0: the caller's.
    """

    def __init__(
        self,
        data: TrainBatches,
        seed: int,
        batch_size: int,
        num_steps: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self._data = data
        self._seed, self._batch_size = seed, batch_size
        self._num_steps = num_steps
        self._device = device
        self._num_workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._asked: deque[tuple[int, Future[Batch]]] = deque()
        self._given = 0  # batches, since the workers began
        self._next = 0  # step whose batch is asked for next

    def __enter__(self) -> BatchQueue:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def batch(self, step: int) -> Batch:
        """The global batch of an attempted step, from 0; best asked for in order.

        Raises:
            UserError: exit 3, workers cannot be begun, or are killed before they have made
                anything. Besides what `train_batch` raises.
            Stopped: by a signal, while workers are waited for.
        """
        if not self._num_workers:
            return self._data.train_batch(self._seed, step, self._batch_size)
        if not self._asked or self._asked[0][0] != step:
            self._begin(step)
        made = self._asked[0][1]
        while not wait([made], timeout=_LOOK).done:
            check()  # a worker that is stopped, or reads from a dead disk, may take for ever
        try:
            batch = made.result()
        except BrokenProcessPool as error:
            what = _why(error)
            if not self._given:
                raise _no_workers(f"{what} before it had made a batch") from error
            _log.warning("%s: others begin with step %d", what, step + 1)
            self._begin(step)
            return self.batch(step)
        self._asked.popleft()
        self._given += 1
        while len(self._asked) < _AHEAD * self._num_workers and self._next < self._num_steps:
            self._ask()
        return batch.to(self._device)

    def _begin(self, step: int) -> None:
        """Workers that make this batch, and none ahead before they have shown that they can."""
        self._end()
        # They make their sockets in a folder of this process, which removes it.
        multiprocessing.util.get_temp_dir()
        others = multiprocessing.active_children()
        self._pool = ProcessPoolExecutor(
            self._num_workers,
            multiprocessing.get_context("fork"),
            _begin_work,
            (self._data, self._seed, self._batch_size),
        )
        self._given, self._next = 0, step
        try:
            with blocked():
                self._ask()  # which forks them all
        except OSError as error:
            raise _no_workers(f"data workers cannot be begun: {error.strerror}") from error
        finally:
            self._workers = [p for p in multiprocessing.active_children() if p not in others]

    def _ask(self) -> None:
        """For the next batch."""
        assert self._pool is not None
        try:
            made = self._pool.submit(_make, self._next)
        except BrokenProcessPool as error:  # to be told when the batch is due
            made = Future()
            made.set_exception(error)
        self._asked.append((self._next, made))
        self._next += 1

    def _end(self) -> None:
        # Killed, for there is nothing to save in them, and a read from a dead disk ends no sooner.
        for worker in self._workers:
            worker.kill()
        if self._pool is not None:
            self._pool.shutdown()
        for worker in self._workers:
            worker.join()
        self._pool, self._workers = None, []
        self._asked.clear()


def _why(error: BrokenProcessPool) -> str:
    """What became of a worker; if anything was raised, its last line is in the cause."""
    told = [line for line in str(error.__cause__ or "").splitlines() if line.strip(" '")]
    return "a data worker was killed" + (f", or its batch got lost ({told[-1]})" if told else "")


def _no_workers(what: str) -> UserError:
    return user_error(
        what,
        "the machine may be short of memory, of room in /dev/shm or of open files: use fewer "
        "`engine.data_workers`, or 0",
        path="engine.data_workers",
        exit_code=Exit.ENVIRONMENT,
    )


_work: tuple[TrainBatches, int, int]


def _begin_work(data: TrainBatches, seed: int, batch_size: int) -> None:
    """The first thing that a worker does."""
    global _work
    _work = data, seed, batch_size
    torch.set_num_threads(1)
    logging.disable()  # a thread that was not forked may hold the terminal
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> NoReturn:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(Exit.BUG)


def _make(step: int) -> Batch:
    data, seed, batch_size = _work
    return data.train_batch(seed, step, batch_size)
