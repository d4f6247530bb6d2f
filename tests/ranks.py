"""Several processes that meet over gloo and stay: each call runs a function in all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mpcli.ranks import Position, join, leave

TIMEOUT = 30.0
"""Seconds that a rank waits for another: one that raised, say."""


class Group:
    """Ranks that wait for work. Importing torch takes them longer than most of it."""

    def __init__(self, world_size: int) -> None:
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(world_size):
            position = Position(rank, world_size, rank, "localhost", self._store.port, "a")
            mine, its = context.Pipe()
            process = context.Process(target=_serve, args=(position, its), daemon=True)
            process.start()
            its.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def run(self, function: Callable[..., Any], *inputs: Any) -> list[Any]:
        """What `function(ranks, *inputs)` returned in each rank, by rank.

        Raises:
            Exception: what the first rank raised that did.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, inputs)))
        # Whole answers as bytes: torch would share the memory of tensors between processes.
        answers = [pickle.loads(pipe.recv_bytes()) for pipe in self._pipes]
        for raised, value in answers:
            if raised:
                raise value
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


@contextlib.contextmanager
def ranks_of(world_size: int) -> Iterator[Group]:
    """A group that ends with the block."""
    group = Group(world_size)
    try:
        yield group
    finally:
        group.close()


def _serve(position: Position, pipe: Connection) -> None:
    torch.set_num_threads(1)
    ranks = join(position, torch.device("cpu"), TIMEOUT)
    while True:
        try:
            function, inputs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            answer = pickle.dumps((False, function(ranks, *inputs)))
        except Exception as error:
            answer = pickle.dumps((True, _portable(error)))
        pipe.send_bytes(answer)
    leave()
    os._exit(0)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
