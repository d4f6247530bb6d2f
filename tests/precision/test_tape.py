"""One pass's random numbers in another of other types."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpcli.precision.tape import RandomTape


def noisy(dtype: torch.dtype) -> tuple[Tensor, ...]:
    values = torch.ones(400, dtype=dtype, requires_grad=True)
    return (
        F.dropout(values, 0.25),
        values + torch.randn_like(values),
        torch.rand(300, dtype=dtype) + 1,
        torch.empty(300, dtype=dtype).normal_(),
        values[torch.randperm(400)],
    )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_another_precision_draws_the_same_numbers(half: torch.dtype) -> None:
    torch.manual_seed(0)
    with RandomTape() as tape:
        drawn = noisy(half)
    torch.manual_seed(1)
    with RandomTape(tape.draws) as given:
        shadow = noisy(torch.float32)
    assert given.matched
    for one, two in zip(drawn, shadow, strict=True):
        assert torch.allclose(one.float(), two, atol=0.02)


def test_recording_changes_no_number() -> None:
    torch.manual_seed(0)
    plain = noisy(torch.float32)
    torch.manual_seed(0)
    with RandomTape():
        recorded = noisy(torch.float32)
    assert all(map(torch.equal, plain, recorded))


def test_other_draws_than_those_of_the_tape_are_told() -> None:
    with RandomTape() as tape:
        torch.rand(3)
        torch.rand(3)
    with RandomTape(tape.draws) as fewer:
        torch.rand(3)
        torch.rand(4)
    assert not fewer.matched
    with RandomTape(tape.draws) as more:
        for _ in range(3):
            torch.rand(3)
    assert not more.matched
