"""How far from trouble a run is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from mpcli.diagnose.evidence import Evidence, Sample
from mpcli.diagnose.facts import Facts
from mpcli.diagnose.margins import margins
from mpcli.records import Replay
from tests.cli.test_diagnose import layer


def of(*largest: float, replay: Replay | None = None) -> dict[str, float | None]:
    """The margins of a run whose outputs have these magnitudes."""
    rows = tuple(layer(1, "a", max=value) for value in largest)
    return margins(Evidence(Facts(path="x", kind="run"), samples=(Sample(1, rows),), replay=replay))


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        ([65520 / 8, 1.0], 3),
        ([65520 * 4], -2),
        ([5e-324], math.log2(65520) + 1074),
        ([1.0, math.inf, math.nan], math.log2(65520)),
        ([-1.0], None),  # no magnitude: a damaged row
        ([0.0], None),
        ([], None),
    ],
)
def test_headroom_is_that_of_the_largest_finite_magnitude(largest, expected):
    found = of(*largest)["forward_headroom_bits"]
    assert found == (expected if expected is None else pytest.approx(expected))


def test_the_flushed_share_is_that_of_the_step_that_was_run_again():
    grads = [SimpleNamespace(flushed=0.25), SimpleNamespace(flushed=0.75), None]
    modules = tuple(SimpleNamespace(parameter_grad=grad) for grad in grads)
    assert of(replay=Replay.model_construct(modules=modules))["flushed_share"] == 0.5
    assert of(replay=Replay.model_construct(modules=()))["flushed_share"] is None
    assert of()["flushed_share"] is None
