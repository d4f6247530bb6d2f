"""Optimizers that the host steps or does not, in two processes: all of them decide the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mpcli.ranks import ALONE
from tests.engines.conformance import Case, train
from tests.ranks import Group

DDP = "engine={kind: ddp, device: cpu, timeout_seconds: 30}"
FP16 = "precision={mode: fp16, loss_scale: {kind: dynamic, init_scale: 256}}"


@pytest.mark.parametrize(
    "optim",
    [
        "{kind: adafactor, lr: 0.05}",
        "{kind: muon, lr: 0.01}",
        pytest.param("{kind: adamw8bit, lr: 0.01, min_8bit_size: 64}", marks=pytest.mark.slow),
    ],
)
def test_two_processes_step_as_one(pair: Group, optim: str) -> None:
    case = Case((f"optim={optim}", FP16, "train.ema=0.9"), micro_batch=4, overflows=(2,))
    alone = train(ALONE, case)
    one, other = pair.run(train, replace(case, settings=(*case.settings, DDP)))
    assert [row[3] for row in one.rows] == [0, 0, 1, 0, 0, 0, 0, 0]  # of one rank's sample
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name
    for name, value in one.before_overflow.items():
        if not name.startswith(("scaler.", "rng.")):
            assert torch.equal(value, one.after_overflow[name]), name
    for row, expected in zip(one.rows, alone.rows, strict=True):
        assert row[0] == pytest.approx(expected[0], rel=0.01, nan_ok=True)

    going_on = replace(case, overflows=(), steps=2, start=one.checkpoint)
    together, _ = pair.run(train, replace(going_on, settings=(*case.settings, DDP)))
    single = train(ALONE, going_on)
    for row, expected in zip(together.rows, single.rows, strict=True):
        assert row[0] == pytest.approx(expected[0], rel=1e-3)
