"""What the fault benchmark promises of itself, without training anything."""

from __future__ import annotations

from typing import get_args

import pytest

from benchmarks.diagnose.faults import FAMILIES, FAULTS, Cell, cells, left_out
from benchmarks.diagnose.score import bound, repair_of
from mpcli.diagnose.finding import FindingId


def test_every_class_is_tried_in_every_family_or_it_is_said_why_not() -> None:
    every = cells(0)
    # With a loss scale, which the benchmark has, it is the operation of a scale that collapses.
    assert set(get_args(FindingId)) - set(FAULTS) == {"forward-nonfinite"}
    assert len(every) == len(FAULTS) * len(FAMILIES)
    assert sum(isinstance(cell, Cell) for cell in every.values()) >= 64
    assert all(cell for cell in every.values())


def test_places_and_the_family_that_is_left_out_follow_from_the_seed() -> None:
    def places(seed: int) -> list[tuple[str, ...]]:
        return [cell.layers for cell in cells(seed).values() if isinstance(cell, Cell)]

    assert places(1) == places(1) != places(2)
    assert {left_out(seed) for seed in range(40)} == set(FAMILIES)


def test_a_healthy_loss_is_within_three_standard_deviations() -> None:
    assert bound({"losses": [1.0, 2.0, 3.0]}) == 5.0


@pytest.mark.parametrize(
    ("name", "suggestion", "expected"),
    [
        ("missing-unscale/mlp", {"what": "use scaler.step(optimizer)"}, "corrected"),
        ("missing-unscale/mlp", {"what": "use a smaller learning rate"}, None),
        ("underflow/mlp", {"what": "think again"}, None),
    ],
)
def test_what_stands_for_a_change_of_code(
    name: str, suggestion: dict[str, object], expected: str | None
) -> None:
    cell = cells(0)[name]
    assert isinstance(cell, Cell)
    whole = {"what": "", "set": [], "code": None, "arguments": {}} | suggestion
    assert repair_of(cell, whole) == {None: None, "corrected": ()}[expected]
