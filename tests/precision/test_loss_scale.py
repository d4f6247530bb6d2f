"""The pure policy, its tensor form and torch's GradScaler take the same decisions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcli.precision.loss_scale import (
    ScaleState,
    advance,
    at_floor,
    floor,
    initial_state,
    to_fp32,
)
from mpcli.precision.scaler import LossScaler
from mpcli.recipe.precision import (
    DynamicScale,
    LossScale,
    NoScale,
    Points,
    ScheduledScale,
    StaticScale,
)
from tests.host_reads import HostReads

CPU = torch.device("cpu")
# Runs of good and of overflowed steps, so that growth and back-off both come about.
overflows = st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=10).map(
    lambda runs: [overflow for overflow, length in runs for _ in range(length)]
)
factors = st.floats(1.01, 8.0)


def points(values: st.SearchStrategy[float]) -> st.SearchStrategy[Points]:
    """Up to 8 points within the first 20 steps."""
    steps = st.sets(st.integers(1, 20), max_size=7).map(lambda later: [0, *sorted(later)])
    return steps.flatmap(
        lambda steps: st.tuples(*[values] * len(steps)).map(
            lambda drawn: tuple(zip(steps, drawn, strict=True))
        )
    )


@st.composite
def dynamic_policies(draw: st.DrawFn) -> DynamicScale:
    low, init, high = sorted(draw(st.tuples(*[st.floats(2.0**-20, 2.0**40)] * 3)))
    floors = draw(points(st.floats(2.0**-20, high)))
    return DynamicScale(
        kind="dynamic",
        init_scale=init,
        growth_factor=draw(factors),
        backoff_factor=1.0 / draw(factors),
        growth_interval=draw(st.integers(1, 6)),
        min_scale=draw(st.sampled_from([low, ((0, low), *floors[1:])])),
        max_scale=high,
        hysteresis=draw(st.integers(1, 4)),
    )


scheduled_policies = st.builds(
    ScheduledScale, kind=st.just("scheduled"), points=points(st.floats(2.0**-126, 2.0**126))
)
policies = st.one_of(
    dynamic_policies(),
    scheduled_policies,
    st.builds(StaticScale, kind=st.just("static"), scale=st.floats(2.0**-126, 2.0**126)),
    st.just(NoScale(kind="none")),
)


@given(policies, overflows)
def test_tensor_form_equals_pure_form(policy: LossScale, sequence: list[bool]) -> None:
    scaler, state = LossScaler(policy, CPU), initial_state(policy)
    for overflow in [None, *sequence]:
        if overflow is not None:
            scaler.update(torch.tensor(float(overflow)))
            state = advance(policy, state, overflow)
        assert state == ScaleState(
            scaler.scale.item(), int(scaler.good_steps), int(scaler.overflows), scaler.attempted
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


@given(overflows, st.integers(1, 5))
def test_hysteresis_is_megatrons_up_to_a_second_back_off(
    sequence: list[bool], hysteresis: int
) -> None:
    """Megatron-LM counts overflows since the last growth, and a back-off does not reset that."""
    policy = DynamicScale(
        kind="dynamic", growth_interval=4, hysteresis=hysteresis, max_scale=2.0**40
    )
    state = initial_state(policy)
    scale, overflowed, good = policy.init_scale, 0, 0
    for overflow in sequence:
        if overflow and overflowed >= hysteresis:
            break
        overflowed += overflow
        good = 0 if overflow else good + 1
        if overflow and overflowed >= hysteresis:
            scale /= 2.0
        if good == 4:
            scale, overflowed, good = scale * 2.0, 0, 0
        state = advance(policy, state, overflow)
        assert state.scale == scale


@given(policies)
def test_the_tensor_form_reads_nothing_on_the_host(policy: LossScale) -> None:
    scaler = LossScaler(policy, CPU)
    with HostReads() as reads:
        for overflow in (0.0, 1.0, 0.0, 0.0):
            found_inf = scaler.unscale_([torch.ones(2)])
            scaler.update(found_inf + overflow)
    assert reads.count == 0


def test_scheduled_follows_its_table_whatever_overflows() -> None:
    table = [8.0, 8.0, 2.0, 16.0, 16.0, 16.0]  # scale of steps 1 to 6
    policy = ScheduledScale(kind="scheduled", points=((0, 8.0), (2, 2.0), (3, 16.0)))
    for overflow in (False, True):
        scaler, state = LossScaler(policy, CPU), initial_state(policy)
        for scale in table:
            assert scaler.scale.item() == state.scale == scale
            scaler.update(torch.tensor(float(overflow)))
            state = advance(policy, state, overflow)


def scales(policy: DynamicScale, sequence: str) -> list[float]:
    """The scale of every step and of the one after, in both forms; `x` overflows, `.` does not."""
    scaler, states = LossScaler(policy, CPU), [initial_state(policy)]
    for step in sequence:
        states.append(advance(policy, states[-1], step == "x"))
        scaler.update(torch.tensor(float(step == "x")))
        assert scaler.scale.item() == states[-1].scale
    return [state.scale for state in states]


def test_a_floor_that_rises_lifts_the_scale_and_one_that_falls_does_not_move_it() -> None:
    policy = DynamicScale(
        kind="dynamic",
        init_scale=8.0,
        growth_interval=3,
        min_scale=((0, 4.0), (3, 16.0), (5, 1.0)),
    )
    assert scales(policy, "xxxxxxx") == [8, 4, 4, 16, 16, 8, 4, 2]
    assert scales(policy, ".......") == [8, 8, 8, 16, 16, 16, 32, 32]
    assert scales(policy, "x......") == [8, 4, 4, 16, 32, 32, 32, 64], "growth counts on"


@given(dynamic_policies(), overflows)
def test_the_scale_is_never_below_its_floor_nor_above_its_maximum(
    policy: DynamicScale, sequence: list[bool]
) -> None:
    state = initial_state(policy)
    for overflow in sequence:
        lowest = to_fp32(floor(policy, state.attempted))
        assert lowest <= state.scale <= to_fp32(policy.max_scale)
        assert at_floor(policy, state.scale, state.attempted) == (state.scale == lowest)
        state = advance(policy, state, overflow)


@given(points(st.floats(1.0, 2.0**20)), st.integers(0, 80))
def test_the_floor_is_that_of_the_last_point_reached(floors: Points, attempted: int) -> None:
    policy = DynamicScale(kind="dynamic", init_scale=2.0**20, min_scale=floors, max_scale=2.0**20)
    ends = [*(step for step, _ in floors[1:]), 10**9]
    (expected,) = (
        value for (begin, value), end in zip(floors, ends, strict=True) if begin <= attempted < end
    )
    assert floor(policy, attempted) == expected


def test_only_a_dynamic_scale_has_a_floor() -> None:
    dynamic = DynamicScale(kind="dynamic", min_scale=((0, 0.1), (10, 64.0)))
    assert at_floor(dynamic, to_fp32(0.1), 9)
    assert not at_floor(dynamic, 0.2, 9)
    assert at_floor(dynamic, 64.0, 10)
    for other in (
        NoScale(kind="none"),
        StaticScale(kind="static", scale=1.0),
        ScheduledScale(kind="scheduled", points=((0, 1.0),)),
    ):
        assert not at_floor(other, 1.0, 0)


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
