"""Two precisions beside each other: what was lost, and where they part."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mpcli.diagnose.passes import Call, ComparedCall, Pass, compare, compared, differing, parting
from mpcli.precision.trace import Kept
from mpcli.records import ShadowComparison


def off(error: float) -> ShadowComparison:
    return ShadowComparison(flushed=0.0, overflowed=0.0, error=error)


def call(
    inputs: float = 0.0,
    outputs: float = 0.0,
    gradients: float = 0.0,
    behind: float = 0.0,
    parameters: float = 0.0,
) -> ComparedCall:
    return ComparedCall(*map(off, (inputs, outputs, gradients, behind, parameters)))


def test_a_comparison_counts_what_was_flushed_and_what_overflowed() -> None:
    exact = torch.tensor([1.0, 1e-9, 0.0, 3.0, math.inf])
    found = compare(torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0]), exact)
    assert found.flushed == 1 / 4  # what is not finite in the shadow does not count
    assert found.overflowed == 0
    assert found.error == pytest.approx(2 / math.sqrt(10))
    found = compare(torch.tensor([1.0, 0.0, 0.0, math.nan, 5.0]), exact)
    assert (found.overflowed, found.error) == (1 / 4, math.inf)
    assert compare(torch.zeros(2), torch.zeros(2)).error == 0
    assert compare(torch.ones(2), torch.zeros(2)).error == math.inf


def test_gradients_are_compared_without_their_scale() -> None:
    model = nn.Linear(1, 1, bias=False)
    both = [
        Pass(
            loss=0.0,
            scale=scale,
            origin=None,
            kept={("", 0): Kept([], [torch.ones(1)], {0: torch.tensor([2.0 * scale])})},
            parameters={"weight": torch.tensor([3.0 * scale])},
        )
        for scale in (1024.0, 1.0)
    ]
    found = compared(model, *both)["", 0]
    assert found.gradients == found.parameters == off(0.0)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ({("a", 0): call(), ("", 0): call()}, None),
        # The first of those that are far off has sound inputs; what follows it has not.
        (
            {("a", 0): call(outputs=0.1), ("b.c", 1): call(0.1, 0.9), ("b", 0): call(0.1, 0.9)},
            ("b.c", 1, "forward", 0.9),
        ),
        # An operation of a container's own: its children were given what is far off already.
        (
            {("b.c", 0): call(0.5, 0.5), ("b", 0): call(0.0, 0.7)},
            ("b", 0, "forward", 0.7),
        ),
        # Backward goes from the end: `b` received sound gradients and sent bad ones to `a`.
        (
            {
                ("a", 0): call(gradients=0.8, behind=0.8),
                ("b.c", 0): call(gradients=0.1, behind=0.8),
                ("b", 0): call(gradients=0.1, behind=0.8),
                ("", 0): call(),
            },
            ("b.c", 0, "backward", 0.8),
        ),
        (
            {("a", 0): call(gradients=0.1, parameters=0.6), ("", 0): call()},
            ("a", 0, "backward", 0.6),
        ),
        (
            {("a", 0): call(gradients=0.8, behind=0.8), ("", 0): call(gradients=0.8)},
            ("loss", 0, "backward", 0.8),
        ),
    ],
)
def test_precisions_part_where_sound_values_become_others(
    calls: dict[Call, ComparedCall], expected: tuple[str, int, str, float] | None
) -> None:
    found = parting(calls)
    assert (found and (found.module, found.call, found.phase, found.error)) == expected


def test_a_difference_in_one_bit_is_seen() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))

    def one(output: float, gradient: float) -> Pass:
        kept = {("0", 0): Kept([], [torch.tensor([output])]), ("", 0): Kept([], [])}
        return Pass(0.0, 1.0, None, kept, {"0.weight": torch.tensor([gradient])})

    assert differing(model, one(math.nan, 1.0), one(math.nan, 1.0)) == []
    assert differing(model, one(0.0, 1.0), one(-0.0, 1.0)) == ["0"]
    assert differing(model, one(1.0, 1.0), one(1.0, 1.0 + 2**-23)) == ["0"]
