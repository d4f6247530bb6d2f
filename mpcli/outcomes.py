"""From device tensors of each step to rows of `steps.jsonl`, without stopping the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcli.engines.base import Outcome
from mpcli.records import StepRecord

BLOCK = 8
"""Steps whose outcomes are copied to the host together."""
MAX_SECONDS = 0.8
"""Slow steps are copied earlier: a row reaches its file within 10 steps or 1 s."""


@dataclass
class _Block:
    """Copied or being copied rows; `ready` is None where the copy is already done."""

    values: Tensor  # fp32 [rows, 4] on the host: loss, grad_norm, scale, found_inf
    memory: tuple[int, int]  # allocated and peak bytes after the last of the steps
    seconds: float  # that the steps took
    ready: torch.cuda.Event | None


class OutcomeLog:
    """Gathers outcomes on the device and gives them back as records a few steps later.

    Args:
        learning_rate: rate by number of applied steps, as the device used it.
        memory: (allocated, peak) bytes now.
        lockstep: give rows back at the same steps in every rank, which then decide the same: by the
            number of steps and `copy_soon`, and not by a clock or by when a copy ends.
        steps: attempted in the attempts before this one, `applied` of them.
    """

    def __init__(
        self,
        device: torch.device,
        attempt: int,
        samples_per_step: int,
        learning_rate: Callable[[int], float],
        memory: Callable[[], tuple[int, int]],
        *,
        steps: int = 0,
        applied: int = 0,
        lockstep: bool = False,
    ) -> None:
        self.attempt = attempt
        self.samples_per_step = samples_per_step
        self.learning_rate = learning_rate
        self.memory = memory
        self.steps = steps  # whose rows were given back
        self.applied = applied
        self.lockstep = lockstep
        # In lockstep on a GPU rows are given back one block later.
        share = 2 if lockstep else 1
        self._block, self._max_seconds = max(1, BLOCK // share), MAX_SECONDS / share
        self._device = device
        self._soon = False
        self._copying: deque[_Block] = deque()
        self._start_block()

    def push(self, outcome: Outcome) -> None:
        """Note one attempted step."""
        self._values += (outcome.loss, outcome.grad_norm, outcome.scale, outcome.found_inf)
        self._length += 1

    def collect(self, *, wait: bool = False) -> list[StepRecord]:
        """The rows that are ready; with `wait`, every row there is."""
        due = self._soon if self.lockstep else self.is_late()
        if self._length and (due or wait or self._length >= self._block):
            self._copy_block()
        records: list[StepRecord] = []
        while self._copying and self._is_ready(self._copying[0], wait):
            records += self._read(self._copying.popleft())
        return records

    def is_late(self) -> bool:
        """Whether the steps since the last copy took so long that they should be copied."""
        return time.monotonic() - self._started > self._max_seconds

    def copy_soon(self) -> None:
        """Copy at the next `collect`."""
        self._soon = True

    def restart_clock(self) -> None:
        """Leave the time since the last row out of `samples_per_second` (an evaluation, say)."""
        self._started = time.monotonic()

    def go_back(self, steps: int, applied: int) -> None:
        """Forget every row that was not given back, and go on after `steps`."""
        self.steps, self.applied = steps, applied
        self._copying.clear()
        self._start_block()

    def _start_block(self) -> None:
        self._values: list[Tensor] = []
        self._length = 0
        self._soon = False
        self._started = time.monotonic()

    def _copy_block(self) -> None:
        rows = torch.stack(self._values).view(self._length, 4)
        seconds = max(time.monotonic() - self._started, 1e-9)
        ready = None
        if self._device.type == "cuda":
            values = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            values.copy_(rows, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            rows = values
        self._copying.append(_Block(rows, self.memory(), seconds, ready))
        self._start_block()

    def _is_ready(self, block: _Block, wait: bool) -> bool:
        if block.ready is None:
            return True
        if self.lockstep:  # the copy before the newest one has long ended
            wait = wait or len(self._copying) > 1
        elif block.ready.query():
            return True
        if wait:
            block.ready.synchronize()
        return wait

    def _read(self, block: _Block) -> list[StepRecord]:
        rows = block.values.tolist()
        samples_per_second = len(rows) * self.samples_per_step / block.seconds
        allocated, peak = block.memory
        records = []
        for loss, grad_norm, scale, found_inf in rows:
            self.steps += 1
            applied = not found_inf
            records.append(
                StepRecord(
                    step=self.steps,
                    attempt=self.attempt,
                    loss=loss,
                    lr=self.learning_rate(self.applied),
                    grad_norm=grad_norm,
                    scale=scale,
                    applied=applied,
                    samples_per_second=samples_per_second,
                    memory_allocated_bytes=allocated,
                    memory_peak_bytes=peak,
                )
            )
            self.applied += applied
        return records
