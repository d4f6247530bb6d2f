"""Healthy runs, in which nothing is to be found (`make verify`)."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from benchmarks.diagnose.faults import FAMILIES
from benchmarks.diagnose.healthy import healthy_runs
from benchmarks.diagnose.jobs import alarms_of, one_thread

pytestmark = pytest.mark.verify
SEED = 1000
"""Another one than the benchmark's."""


def test_nothing_is_found_in_healthy_runs() -> None:
    runs = list(healthy_runs(FAMILIES, SEED))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=one_thread) as pool:
        found = dict(zip([run.name for run in runs], pool.map(alarms_of, runs), strict=True))
    assert len(found) >= 50
    learnt_nothing = {name: run["loss"] for name, run in found.items() if not run["loss"] < 2.0}
    assert not learnt_nothing  # of 10 classes, chance is 2.3
    assert not {name: run["alarms"] for name, run in found.items() if run["alarms"]}
