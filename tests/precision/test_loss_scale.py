"""The pure policy, its tensor form and torch's GradScaler take the same decisions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcli.precision.loss_scale import ScaleState, advance, initial_state, to_fp32
from mpcli.precision.scaler import LossScaler
from mpcli.recipe.precision import DynamicScale, LossScale, NoScale, StaticScale

CPU = torch.device("cpu")
overflows = st.lists(st.booleans(), max_size=60)
factors = st.floats(1.01, 8.0)


@st.composite
def dynamic_policies(draw: st.DrawFn) -> DynamicScale:
    low, init, high = sorted(draw(st.tuples(*[st.floats(2.0**-20, 2.0**40)] * 3)))
    return DynamicScale(
        kind="dynamic",
        init_scale=init,
        growth_factor=draw(factors),
        backoff_factor=1.0 / draw(factors),
        growth_interval=draw(st.integers(1, 6)),
        min_scale=low,
        max_scale=high,
        hysteresis=draw(st.integers(1, 4)),
    )


@given(dynamic_policies(), overflows)
def test_tensor_form_equals_pure_form(policy: DynamicScale, sequence: list[bool]) -> None:
    scaler, state = LossScaler(policy, CPU), initial_state(policy)
    for overflow in sequence:
        scaler.update(torch.tensor(float(overflow)))
        state = advance(policy, state, overflow)
        assert (
            ScaleState(scaler.scale.item(), int(scaler.good_steps), int(scaler.overflows)) == state
        )
        inverse = scaler.unscale_([gradient := torch.ones(1)])
        assert not inverse
        assert gradient.item() == to_fp32(1.0 / state.scale)


@given(
    init=st.floats(2.0**-10, 2.0**20),
    growth=factors,
    backoff=factors,
    interval=st.integers(1, 6),
    sequence=overflows,
)
def test_decisions_equal_grad_scaler(
    init: float, growth: float, backoff: float, interval: int, sequence: list[bool]
) -> None:
    policy = DynamicScale(
        kind="dynamic",
        init_scale=init,
        growth_factor=growth,
        backoff_factor=1.0 / backoff,
        growth_interval=interval,
        min_scale=1e-37,  # the bounds, which GradScaler lacks, out of the way
        max_scale=2.0**126,
    )
    theirs = torch.amp.GradScaler(
        "cpu",
        init_scale=init,
        growth_factor=growth,
        backoff_factor=1.0 / backoff,
        growth_interval=interval,
    )
    ours = LossScaler(policy, CPU)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflow in sequence:
        loss = (weight * (float("inf") if overflow else 1.0)).sum()
        theirs.scale(loss).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(float(overflow)))
        assert ours.scale.item() == theirs.get_scale()


@given(overflows, st.integers(1, 5))
def test_hysteresis_backs_off_on_the_hth_overflow_since_the_last_change(
    sequence: list[bool], hysteresis: int
) -> None:
    policy = DynamicScale(
        kind="dynamic", growth_interval=4, hysteresis=hysteresis, min_scale=2.0**-100
    )
    state, since_change = initial_state(policy), 0
    for overflow in sequence:
        before = state.scale
        state = advance(policy, state, overflow)
        since_change += overflow
        assert (state.scale < before) == (overflow and since_change == hysteresis)
        if state.scale != before:
            since_change = 0


@pytest.mark.parametrize(
    ("policy", "scale"),
    [(NoScale(kind="none"), 1.0), (StaticScale(kind="static", scale=1024.0), 1024.0)],
)
def test_static_policies_never_move(policy: LossScale, scale: float) -> None:
    scaler, state = LossScaler(policy, CPU), initial_state(policy)
    for overflow in (True, False, True):
        scaler.update(torch.tensor(float(overflow)))
        state = advance(policy, state, overflow)
    assert scaler.scale.item() == state.scale == scale


def test_scale_stays_within_its_bounds() -> None:
    policy = DynamicScale(
        kind="dynamic", init_scale=4.0, min_scale=3.0, max_scale=5.0, growth_interval=1
    )
    assert advance(policy, initial_state(policy), True).scale == 3.0
    assert advance(policy, initial_state(policy), False).scale == 5.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_unscale_finds_one_bad_element(bad: float) -> None:
    scaler = LossScaler(StaticScale(kind="static", scale=4.0), CPU)
    good, mixed = torch.full((3,), 8.0), torch.tensor([1.0, bad, 2.0])
    assert scaler.unscale_([good]).item() == 0.0
    assert torch.equal(good, torch.full((3,), 2.0))
    assert scaler.unscale_([good, mixed]).item() == 1.0
