"""A fix is one where the symptom is gone and the loss is none the worse, beyond noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import pytest

from mpcli.diagnose.finding import Finding, FindingId
from mpcli.diagnose.rerun import Rerun
from mpcli.diagnose.symptoms import SYMPTOMS, judged, symptom_of
from mpcli.records import StepRecord

NAN, INF = math.nan, math.inf
FALLING = [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3]


def rerun(losses: Sequence[float], skipped: Sequence[int] = (), **numbers: Any) -> Rerun:
    """Steps with these losses, of which some (from 1) were skipped."""
    rows = [
        StepRecord(
            step=step,
            attempt=0,
            loss=loss,
            lr=0.1,
            grad_norm=1.0,
            scale=1.0,
            applied=step not in skipped,
            samples_per_second=1.0,
            memory_allocated_bytes=0,
            memory_peak_bytes=0,
        )
        for step, loss in enumerate(losses, 1)
    ]
    sound = {"broken": 0, "seconds": 1.0, "peak_memory": 100, "lost": 0.0, "flushed": 0.0}
    return Rerun(rows=rows, **({**sound, "errors": {}} | numbers))


def finding(name: FindingId, *layers: str) -> Finding:
    return Finding(
        id=name,
        severity="error",
        cause="by hand",
        phase="forward",
        layers=layers,
        confidence=1,
        evidence={},
    )


def verdict(name: FindingId, without: Rerun, with_it: Rerun, *layers: str) -> tuple[bool, str]:
    found = finding(name, *layers)
    symptom = symptom_of(found, without)
    assert symptom is not None
    return judged(symptom, found, without, with_it)


def test_every_symptom_is_of_a_finding() -> None:
    assert set(SYMPTOMS) <= set(get_args(FindingId))


BROKEN = rerun(FALLING, broken=2)


@pytest.mark.parametrize(
    ("losses", "fixed", "why"),
    [
        (FALLING, True, "loss 1.35, and 1.35 without it"),
        ([loss * 1.04 for loss in FALLING], True, "without it"),  # less than seeds differ
        ([loss * 1.2 for loss in FALLING], False, "but loss 1.62"),
        ([*FALLING[:6], 1.0, 2.2], True, "loss 1.6"),  # one step is noise
        ([*FALLING[:7], NAN], False, "the loss is nan in 1 of the last 2 steps"),
        ([*FALLING[:7], INF], False, "the loss is inf"),
    ],
)
def test_a_fix_may_not_cost_loss(losses: list[float], fixed: bool, why: str) -> None:
    found, said = verdict("forward-overflow", BROKEN, rerun(losses))
    assert found == fixed and why in said


def test_a_loss_with_nothing_to_compare_may_not_rise() -> None:
    without = rerun([2.0, *[NAN] * 7], broken=7)
    assert verdict("forward-overflow", without, rerun(FALLING))[0]
    assert not verdict("forward-overflow", without, rerun(FALLING[::-1]))[0]


@pytest.mark.parametrize(
    ("name", "before", "sound", "ill"),
    [
        ("forward-overflow", {"broken": 2}, {"broken": 0}, {"broken": 1}),
        ("skip-storm", {"skipped": [5, 6, 7]}, {"skipped": [1, 2, 3]}, {"skipped": [8]}),
        ("underflow", {"flushed": 0.4}, {"flushed": 0.2}, {"flushed": 0.3}),
        ("lost-updates", {"lost": 0.4}, {"lost": 0.0}, {"lost": 0.4}),
        ("norm-in-half", {"errors": {"a": 0.2, "b": 9.0}}, {"errors": {"a": 0.1, "b": 9.0}},
         {"errors": {"a": INF, "b": 0.0}}),
        ("norm-in-half", {"errors": {"a": 0.2}, "broken": 1}, {"errors": {"a": 0.2}},
         {"errors": {"a": 0.0}, "broken": 1}),
        ("half-reduction", {"errors": {"a": INF}}, {"errors": {"a": 0.1}}, {"errors": {"a": INF}}),
        ("fp32-island", {"seconds": 1.0}, {"seconds": 0.9}, {"seconds": 0.99}),
        ("out-of-memory", {"peak_memory": 100}, {"peak_memory": 90}, {"peak_memory": 100}),
    ],
)  # fmt: skip
def test_what_has_to_go_away(
    name: FindingId, before: dict[str, Any], sound: dict[str, Any], ill: dict[str, Any]
) -> None:
    without = rerun(FALLING, **before)
    assert verdict(name, without, rerun(FALLING, **sound), "a")[0]
    assert not verdict(name, without, rerun(FALLING, **ill), "a")[0]


@pytest.mark.parametrize("name", ["forward-overflow", "skip-storm", "underflow", "norm-in-half"])
def test_what_steps_do_not_show_cannot_go_away(name: FindingId) -> None:
    assert symptom_of(finding(name), rerun(FALLING)) is None
    assert symptom_of(finding("nondeterminism"), rerun(FALLING)) is None


@pytest.mark.parametrize(
    ("before", "after", "fixed"),
    [
        (FALLING[::-1], FALLING, True),
        ([2.0] * 8, FALLING, True),
        (FALLING, FALLING, False),
        (FALLING, [loss * 0.97 for loss in FALLING], False),  # as another seed might
        ([9.0] * 8, [2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0], False),  # rises
        ([2.0, INF, *[NAN] * 6], FALLING, True),
        ([2.0, INF, -INF, *[NAN] * 5], FALLING[::-1], False),
    ],
)
def test_training_that_goes_wrong_has_to_go_clearly_better(
    before: list[float], after: list[float], fixed: bool
) -> None:
    assert verdict("learning-rate", rerun(before), rerun(after))[0] is fixed


def test_one_step_is_enough_to_judge() -> None:
    assert verdict("forward-overflow", rerun([NAN], broken=1), rerun([1.0]))[0]
