"""Schedules against torch's and their definitions; optimizers against torch's defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpcli.optim import build_optimizer
from mpcli.optim.schedule import learning_rate, learning_rate_table
from mpcli.recipe.errors import UserError
from mpcli.recipe.optim import Adam, AdamW, Constant, Cosine, Linear, OneCycle, Optim, Schedule, Sgd
from tests.small import small_recipe

steps_and_warmup = {"steps": st.integers(1, 200), "warmup": st.floats(0.0, 0.99)}


@given(steps=st.integers(2, 200), warmup=st.floats(0.01, 0.99))
def test_one_cycle_is_torchs(steps: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    if warmup * steps - 1 <= 0 or abs(warmup * steps - steps) < 1e-9:
        return  # torch divides by zero, or never comes down
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    schedule = OneCycle(kind="one-cycle", warmup=warmup)
    for applied in range(steps):
        ours = learning_rate(schedule, 0.4, steps, applied)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)
        if applied < steps - 1:
            optimizer.step()
            theirs.step()


@given(**steps_and_warmup)
def test_warm_up_rises_to_the_peak(steps: int, warmup: float) -> None:
    warmup_steps = round(warmup * steps)
    rates = [
        learning_rate(Constant(kind="constant", warmup=warmup), 0.5, steps, applied)
        for applied in range(steps)
    ]
    assert all(rate > 0 for rate in rates)
    assert rates == sorted(rates)
    assert rates[warmup_steps:] == [0.5] * (steps - warmup_steps)
    assert all(rate < 0.5 for rate in rates[:warmup_steps])


@pytest.mark.parametrize(
    "schedule",
    [Constant(kind="constant", warmup=0.3), Linear(kind="linear", warmup=0.3)],
    ids=lambda schedule: schedule.kind,
)
def test_warm_up_rises_by_equal_amounts(schedule: Schedule) -> None:
    rates = [learning_rate(schedule, 0.5, 10, applied) for applied in range(4)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5])


@given(**steps_and_warmup)
def test_linear_and_cosine_fall_from_the_peak_towards_zero(steps: int, warmup: float) -> None:
    start = round(warmup * steps)
    for kind in (Linear(kind="linear", warmup=warmup), Cosine(kind="cosine", warmup=warmup)):
        falling = [learning_rate(kind, 0.5, steps, applied) for applied in range(start, steps)]
        assert falling == sorted(falling, reverse=True)
        if falling:
            assert falling[0] == 0.5
            assert all(rate > 0 for rate in falling)


def test_cosine_without_warm_up_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for applied in range(50):
        ours = learning_rate(Cosine(kind="cosine"), 0.3, 50, applied)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_runs_have_a_rate_for_every_step(steps: int) -> None:
    optim = Sgd(kind="sgd", lr=0.1, schedule=OneCycle(kind="one-cycle", warmup=0.3))
    table = learning_rate_table(optim, steps, torch.device("cpu"))
    assert table.shape == (steps,)
    assert table.dtype == torch.float32
    assert bool((table > 0).all())
    assert table.max() <= 0.1


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


OPTIMIZERS: list[tuple[Optim, type[torch.optim.Optimizer], dict[str, object]]] = [
    (
        Sgd(kind="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
    ),
    (Sgd(kind="sgd", lr=0.1), torch.optim.SGD, {}),
    (Adam(kind="adam", lr=0.01, weight_decay=0.01), torch.optim.Adam, {}),
    (AdamW(kind="adamw", lr=0.01, betas=(0.8, 0.95)), torch.optim.AdamW, {"betas": (0.8, 0.95)}),
]


@pytest.mark.parametrize(("optim", "torchs", "arguments"), OPTIMIZERS)
def test_optimizer_equals_torchs_unfused(
    optim: Optim, torchs: type[torch.optim.Optimizer], arguments: dict[str, object]
) -> None:
    ours_model, theirs_model = _model(), _model()
    ours = build_optimizer(optim, list(ours_model.named_parameters()), torch.tensor(optim.lr))
    theirs = torchs(
        [
            {
                "params": [p for p in theirs_model.parameters() if p.ndim > 1],
                "weight_decay": optim.weight_decay,
            },
            {"params": [p for p in theirs_model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=optim.lr,
        **arguments,  # type: ignore[arg-type]
    )
    x = torch.randn(16, 4)
    for _ in range(5):
        for model, optimizer in ((ours_model, ours), (theirs_model, theirs)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours_model.parameters(), theirs_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_tables_of_biases_do_not_decay() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("position_bias_table", nn.Parameter(torch.ones(2, 2)))
    weight, bias, table = (p.detach().clone() for p in model.parameters())
    sgd = Sgd(kind="sgd", lr=1.0, weight_decay=0.5)
    optimizer = build_optimizer(sgd, list(model.named_parameters()), torch.tensor(1.0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, expected in zip(model.parameters(), (0.5 * weight, bias, table), strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_rate_that_fp32_cannot_hold_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        small_recipe(tmp_path, f"optim={{kind: {kind}, lr: 1e300}}")
    assert [problem.path for problem in caught.value.problems] == ["optim.lr"]
