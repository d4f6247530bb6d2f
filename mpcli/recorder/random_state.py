"""The random numbers that a loop draws: kept, and drawn again."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Of torch by device (`cpu`, `cuda`), of `random`, and of `numpy.random`."""

    by_device: dict[str, Tensor]
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The state at this moment, on the CPU and one device."""
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return cls(states, random.getstate(), np.random.get_state())

    def restore(self, device: torch.device) -> None:
        """Make it the state again."""
        torch.set_rng_state(self.by_device["cpu"])
        if "cuda" in self.by_device:
            torch.cuda.set_rng_state(self.by_device["cuda"], device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextlib.contextmanager
def untouched_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn in the block is not missing after it."""
    state = RandomState.now(device)
    try:
        yield
    finally:
        state.restore(device)
