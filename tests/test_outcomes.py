"""Rows from device tensors: soon, and with the rate of their own steps."""

from __future__ import annotations

import pytest
import torch

from mpcli import outcomes
from mpcli.engines.base import Outcome
from mpcli.outcomes import BLOCK, OutcomeLog
from mpcli.records import StepRecord
from tests.clock import Clock, stop_time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stop_time(monkeypatch)


@pytest.fixture
def log(clock: Clock) -> OutcomeLog:
    return OutcomeLog(
        torch.device("cpu"),
        attempt=1,
        samples_per_step=16,
        learning_rate=lambda applied: 0.1,
        memory=lambda: (1, 2),
    )


def steps(log: OutcomeLog, number: int) -> list[StepRecord]:
    """Rows given back while so many steps are taken."""
    rows = []
    for _ in range(number):
        log.push(Outcome(torch.ones(()), torch.ones(()), torch.ones(()), torch.zeros(())))
        rows += log.collect()
    return rows


def test_rows_come_within_10_steps(log: OutcomeLog) -> None:
    assert steps(log, 1) == []  # many together, while they are fast
    assert steps(log, 9)


def test_a_row_comes_within_a_second(log: OutcomeLog, clock: Clock) -> None:
    steps(log, 1)
    clock.now += 1.0
    assert [row.step for row in log.collect()] == [1]


def test_the_rate_is_that_of_the_steps_alone(log: OutcomeLog, clock: Clock) -> None:
    steps(log, 1)
    clock.now += 0.5
    (row,) = log.collect(wait=True)
    assert row.samples_per_second == 32.0
    clock.now += 100.0  # an evaluation
    log.restart_clock()
    steps(log, 1)
    clock.now += 2.0
    (row,) = log.collect()
    assert row.samples_per_second == 8.0


class Copying:
    """A CUDA event that has not come yet."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


def test_blocks_read_together_keep_their_own_rates(
    log: OutcomeLog, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = outcomes._Block
    monkeypatch.setattr(outcomes, "_Block", lambda *fields: block(*fields[:-1], Copying()))
    for seconds in (0.25, 0.5):
        steps(log, BLOCK - 1)
        clock.now += seconds
        assert steps(log, 1) == []
    rates = [row.samples_per_second for row in log.collect(wait=True)]
    assert rates == [BLOCK * 16 / 0.25] * BLOCK + [BLOCK * 16 / 0.5] * BLOCK
