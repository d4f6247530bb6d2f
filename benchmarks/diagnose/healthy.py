"""Healthy trainings: all families, modes and loops. Nothing is to be found in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.diagnose.runs import OPTIM
from benchmarks.diagnose.score import HEALTHY_LOOPS, false_alarms, loop_alarms
from benchmarks.diagnose.task import Family

MODES: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "fp16": (),
    "bf16": (),
    "fp16-master": (),
    "bf16-master": (),
    # What storing everything in half takes to be healthy (docs/precision.md).
    "fp16-pure": ("optim.eps=1e-4",),
    "bf16-pure": ("precision.stochastic_rounding=true",),
}
LOOPS = ("wrong_device", "clip_first", "step_in_window", "moment_before_check", "plain_fp32")
"""Of `loops.py`, corrected."""


@dataclass(frozen=True)
class Healthy:
    """A healthy training: of a recipe in a mode, or a loop."""

    family: Family
    how: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.family} {self.how} {self.seed}"

    def alarms(self) -> dict[str, Any]:
        if self.how in HEALTHY_LOOPS:
            return loop_alarms(self.how, self.family, self.seed)
        settings = [s for s in MODES[self.how] if "eps" not in s or "adam" in OPTIM[self.family]]
        overrides = (f"precision.mode={self.how}", *settings)
        return false_alarms(self.family, overrides, self.seed)


def healthy_runs(families: Sequence[Family], seed: int) -> Iterator[Healthy]:
    """Two seeds of every mode, one of every loop, in each family."""
    for family in families:
        for mode in MODES:
            for number in range(2):
                yield Healthy(family, mode, seed + 100 + number)
        for loop in LOOPS:
            yield Healthy(family, loop, seed + 100)
