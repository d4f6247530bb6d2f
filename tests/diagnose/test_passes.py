"""Two precisions beside each other: what was lost, and where they part."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mpcli.diagnose.passes import (
    Call,
    ComparedCall,
    Difference,
    Pass,
    compare,
    compared,
    differing,
    parting,
)
from mpcli.precision.trace import Kept
from mpcli.records import ShadowComparison


def off(error: float, norm: float = 1.0, flushed: float = 0.0) -> Difference:
    seen = ShadowComparison(flushed=flushed, overflowed=0.0, error=error)
    return Difference(seen, error * norm, norm, 1)


def call(
    inputs: float | Difference = 0.0,
    outputs: float | Difference = 0.0,
    gradients: float | Difference = 0.0,
    behind: float | Difference = 0.0,
    parameters: float | Difference = 0.0,
) -> ComparedCall:
    values = (inputs, outputs, gradients, behind, parameters)
    return ComparedCall(*(v if isinstance(v, Difference) else off(v) for v in values))


def test_a_comparison_counts_what_was_flushed_and_what_overflowed() -> None:
    exact = torch.tensor([1.0, 1e-9, 0.0, 3.0, math.inf])
    found = compare(torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0]), exact)
    assert found.seen.flushed == 1 / 4  # what is not finite in the shadow does not count
    assert found.seen.overflowed == 0
    assert found.seen.error == pytest.approx(2 / math.sqrt(10))
    assert (found.size, found.norm) == pytest.approx((2, math.sqrt(10)))
    assert found.elements == 4
    found = compare(torch.tensor([1.0, 0.0, 0.0, math.nan, 5.0]), exact)
    assert (found.seen.overflowed, found.seen.error) == (1 / 4, math.inf)
    assert compare(torch.zeros(2), torch.zeros(2)).seen.error == 0
    assert compare(torch.ones(2), torch.zeros(2)).seen.error == math.inf


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
    assert found.gradients == off(0.0, 2.0)
    assert found.parameters == off(0.0, 3.0)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ({("a", 0): call(), ("", 0): call()}, None),
        # The first of those that are far off has sound inputs; what follows it has not.
        (
            {("a", 0): call(outputs=0.1), ("b.c", 1): call(0.01, 0.9), ("b", 0): call(0.01, 0.9)},
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
                ("b.c", 0): call(gradients=0.01, behind=0.8),
                ("b", 0): call(gradients=0.01, behind=0.8),
                ("", 0): call(),
            },
            ("b.c", 0, "backward", 0.8),
        ),
        (
            {("a", 0): call(gradients=0.01, parameters=0.6), ("", 0): call()},
            ("a", 0, "backward", 0.6),
        ),
        (
            {("a", 0): call(gradients=0.8), ("", 0): call(gradients=off(0.8, flushed=0.5))},
            ("loss", 0, "backward", 0.8),
        ),
        # Of two of them, the first in the order of backward.
        (
            {("a", 0): call(behind=0.8), ("d", 0): call(behind=0.9), ("", 0): call()},
            ("d", 0, "backward", 0.9),
        ),
        # Near its minimum a loss has differences for gradients.
        ({("a", 0): call(gradients=0.8), ("", 0): call(gradients=0.8)}, None),
        # Nearly equal tensors of norm 1, each off by 2^-11, are subtracted; and what holds it.
        (
            {
                ("b.c", 0): call(2.0**-11, off(2.4, norm=2.0**-11)),
                ("b", 0): call(outputs=2.4),
                ("d", 0): call(2.4, 2.4),
                ("", 0): call(outputs=2.4),
            },
            None,
        ),
        # The difference is that of exact inputs' rounding.
        ({("a", 0): call(0.0, off(2.4, norm=2.0**-11)), ("", 0): call()}, None),
        ({("a", 0): call(0.0, off(2.4, norm=2.0**-5)), ("", 0): call()}, ("a", 0, "forward", 2.4)),
        # What many layers add up crosses the limit in one of them.
        ({("a", 0): call(0.1, off(0.3, norm=99.0)), ("", 0): call(0.0, 0.3)}, None),
        (
            {
                ("b.c", 0): call(gradients=0.1, behind=off(0.3, norm=99.0)),
                ("b", 0): call(behind=off(0.3, norm=99.0)),
                ("", 0): call(),
            },
            None,
        ),
        # A mask that is off already is what the backward of a product is computed with.
        ({("a", 0): call(0.1, 0.2, 0.0, off(0.6, norm=9.0)), ("", 0): call()}, None),
        # Infinity that reaches no weight; and such that does.
        ({("a", 0): call(behind=off(math.inf)), ("", 0): call()}, None),
        (
            {
                ("b", 0): call(gradients=off(math.inf), parameters=off(math.inf)),
                ("a", 0): call(behind=off(math.inf)),
                ("", 0): call(),
            },
            ("a", 0, "backward", math.inf),
        ),
        # The gradients of a bias cancel over the batch: here to 2^-8 of what is added up.
        (
            {
                ("a", 0): call(off(0.0, 30.0), 0.0, 0.001, 0.0, off(3.0, norm=2.0**-8)),
                ("", 0): call(),
            },
            None,
        ),
    ],
)
def test_precisions_part_where_sound_values_become_others(
    calls: dict[Call, ComparedCall], expected: tuple[str, int, str, float] | None
) -> None:
    found = parting(calls, "fp16")
    assert (found and (found.module, found.call, found.phase, found.error)) == expected


def test_a_difference_in_one_bit_is_seen() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))

    def one(output: float, gradient: float) -> Pass:
        kept = {("0", 0): Kept([], [torch.tensor([output])]), ("", 0): Kept([], [])}
        return Pass(0.0, 1.0, None, kept, {"0.weight": torch.tensor([gradient])})

    assert differing(model, one(math.nan, 1.0), one(math.nan, 1.0)) == []
    assert differing(model, one(0.0, 1.0), one(-0.0, 1.0)) == ["0"]
    assert differing(model, one(1.0, 1.0), one(1.0, 1.0 + 2**-23)) == ["0"]


def test_bf16_may_be_farther_off_than_fp16() -> None:
    calls = {("a", 0): call(outputs=0.4), ("", 0): call()}
    assert parting(calls, "fp16") and not parting(calls, "bf16")
    assert parting({("a", 0): call(outputs=0.6), ("", 0): call()}, "bf16")
