"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from mpcli.recipe.optim import Constant, Cosine, Linear, OneCycle, Optim, Schedule


def learning_rate(schedule: Schedule, peak: float, steps: int, applied: int) -> float:
    """The rate of the step that follows `applied` applied steps, in a run of `steps` steps.

    Warm-up rises linearly to `peak` over the first `warmup * steps` steps (not from zero: a step
    at rate 0 would be wasted); `one-cycle` is `torch.optim.lr_scheduler.OneCycleLR` with
    `pct_start=warmup` and torch's defaults, momentum left alone (Smith & Topin 2018).
    """
    if isinstance(schedule, OneCycle):
        return _one_cycle(schedule.warmup, peak, steps, applied)
    warmup_steps = round(schedule.warmup * steps)
    if applied < warmup_steps:
        return peak * (applied + 1) / (warmup_steps + 1)
    done = (applied - warmup_steps) / max(1, steps - warmup_steps)
    match schedule:
        case Constant():
            return peak
        case Linear():
            return peak * (1.0 - done)
        case Cosine():
            return peak * 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            assert_never(schedule)


def _one_cycle(warmup: float, peak: float, steps: int, applied: int) -> float:
    start, end = peak / 25.0, peak / 25.0 / 1e4
    top = warmup * steps - 1.0  # the step of the peak; may fall between two steps
    last = steps - 1.0
    if applied <= top or last <= top:
        low, share = start, applied / top if top > 0 else 1.0
    else:
        low, share = end, 1.0 - (applied - top) / (last - top)
    return low + (peak - low) * 0.5 * (1.0 - math.cos(math.pi * min(1.0, share)))


def learning_rate_table(optim: Optim, steps: int, device: torch.device) -> Tensor:
    """fp32 [steps]: the rate by number of applied steps, to be read on the device."""
    rates = [learning_rate(optim.schedule, optim.lr, steps, applied) for applied in range(steps)]
    return torch.tensor(rates, dtype=torch.float32, device=device)
