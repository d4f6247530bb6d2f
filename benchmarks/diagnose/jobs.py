"""What the benchmark's processes do. A cell is made anew there: what it does is code."""

from __future__ import annotations

import logging
from typing import Any

import torch

from benchmarks.diagnose.faults import Cell, cells
from benchmarks.diagnose.healthy import Healthy
from benchmarks.diagnose.score import control, examine


def one_thread() -> None:
    """Begin a process; what runs tell of their faults is in their records."""
    torch.set_num_threads(1)
    logging.disable()


def control_of(name: str, seed: int) -> dict[str, Any]:
    return control(_cell(name, seed), seed)


def examined(name: str, seed: int, healthy: dict[str, Any], diagnose: bool) -> dict[str, Any]:
    return examine(_cell(name, seed), healthy, seed, diagnose=diagnose)


def alarms_of(run: Healthy) -> dict[str, Any]:
    return run.alarms()


def _cell(name: str, seed: int) -> Cell:
    cell = cells(seed)[name]
    assert isinstance(cell, Cell)
    return cell
