"""Stochastic rounding to bf16: unbiased, exact where nothing is to be rounded, reproducible."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpcli.precision.rounding import round_stochastically

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rounded(values: Tensor, seed: int = 0, step: int = 0, offset: int = 0) -> Tensor:
    return round_stochastically(values, seed, torch.tensor([step]), offset)


@given(value=finite, step=st.integers(0, 2**40), seed=st.integers(0, 2**63 - 1))
def test_the_result_is_one_of_the_two_neighbours(value: float, step: int, seed: int) -> None:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    below = bits & 0xFFFF0000
    neighbours = {below} if below == bits else {below, below + 0x10000}
    (found,) = rounded(torch.tensor([value]), seed, step).float().view(torch.int32).tolist()
    assert found & 0xFFFFFFFF in neighbours


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 2.0**-133, float("inf"), -float("inf")])
def test_what_bf16_holds_stays(value: float) -> None:
    result = rounded(torch.full((1000,), value)).float()
    assert torch.equal(result, torch.full((1000,), value))
    assert torch.equal(result.signbit(), torch.full((1000,), value).signbit())


def test_nan_stays_nan() -> None:
    every_bit = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert bool(rounded(every_bit).isnan().all())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_expectation_is_the_value(share: float, sign: float) -> None:
    """bf16 has steps of 2^-7 at 1; the mean of n draws is within 5 standard deviations."""
    n, step = 200_000, 2.0**-7
    result = rounded(torch.full((n,), sign * (1.0 + share * step))).double()
    assert set(result.tolist()) == {sign, sign * (1.0 + step)}
    deviation = step * (share * (1.0 - share) / n) ** 0.5
    assert abs(result.mean().item() - sign * (1.0 + share * step)) < 5 * deviation


def test_noise_differs_between_steps_seeds_and_weights_and_repeats_otherwise() -> None:
    values = torch.full((4096,), 1.0 + 0.5 * 2.0**-7)
    first = rounded(values, seed=1, step=5, offset=0)
    assert torch.equal(first, rounded(values, seed=1, step=5, offset=0))
    assert torch.equal(first[100:], rounded(values[100:], seed=1, step=5, offset=100))
    others = [
        rounded(values, seed=2, step=5, offset=0),
        rounded(values, seed=1, step=6, offset=0),
        rounded(values, seed=1, step=5, offset=4096),
    ]
    for other in others:  # independent draws of a fair coin agree half of the time
        assert abs((first == other).double().mean().item() - 0.5) < 0.05


def test_neighbouring_weights_and_steps_are_uncorrelated() -> None:
    values = torch.full((65_536,), 1.0 + 0.5 * 2.0**-7)
    up = torch.stack([(rounded(values, step=step) > 1).double() - 0.5 for step in range(8)])
    for apart in (1, 2, 64):
        correlation = 4 * (up[:, apart:] * up[:, :-apart]).mean().item()
        assert abs(correlation) < 5 / up.numel() ** 0.5
    assert abs(4 * (up[1:] * up[:-1]).mean().item()) < 5 / up.numel() ** 0.5


def test_strides_do_not_matter() -> None:
    values = torch.rand(2, 3, 4, 4)
    expected = rounded(values)
    assert torch.equal(rounded(values.contiguous(memory_format=torch.channels_last)), expected)
