"""Where runs differ, and whether that is more than noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcli.cli.compared import _sentences, as_object
from mpcli.comparison.compare import Comparison, compare
from mpcli.comparison.curves import apart, read_curve, tenths
from mpcli.comparison.differences import Differing, differing, flat
from mpcli.comparison.sides import read_run
from mpcli.rundir import RunDirectory
from tests.synthetic_runs import ENVIRONMENT, make_run, row

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
VALUES = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.recursive(LEAVES, lambda v: st.dictionaries(st.text("xy", min_size=1), v, max_size=2)),
    max_size=3,
)


def compared(*paths: Path) -> Comparison:
    """These runs beside each other."""
    return compare([read_run(path) for path in paths])


def seeded(folder: Path, name: str, accuracies: list[float], *overrides: str) -> list[Path]:
    """A run for each accuracy, with seeds from 0."""
    return [
        make_run(
            folder / f"{name}-{seed}", f"train.seed={seed}", *overrides, done=10, steps=10,
            metrics={"accuracy": accuracy},
        )
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip


def test_nested_values_and_lists_of_them_have_paths():
    found = flat({"a": {"b": 1, "c": {}}, "d": [{"e": 2}, {"e": [3, 4]}], "f": []})
    assert found == {"a.b": 1, "a.c": {}, "d.0.e": 2, "d.1.e": [3, 4], "f": []}


def test_a_path_differs_between_sides_or_within_one():
    one, two, three = {"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 1, "c": None}
    assert differing([[one, two], [three], [None]]) == [
        Differing("b", ((1, 2), (), None)),
        Differing("c", ((), (None,), None)),
    ]
    assert differing([[one], [dict(one)]]) == []


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_values_differ_from_themselves_nowhere(a, b):
    assert differing([[flat(a)], [flat(a)]]) == []
    paths = {row.path for row in differing([[flat(a)], [flat(b)]])}
    assert paths == {row.path for row in differing([[flat(b)], [flat(a)]])}
    assert (not paths) == (flat(a) == flat(b))


def test_runs_that_differ_in_the_seed_alone_are_a_group(tmp_path):
    fp32 = seeded(tmp_path, "fp32", [0.9, 0.91])
    bf16 = seeded(tmp_path, "bf16", [0.8, 0.82], "precision.mode=bf16", "name=other")
    found = compared(fp32[0], bf16[0], fp32[1], bf16[1])
    assert [(side.label, side.seeds) for side in found.sides] == [("A", (0, 1)), ("B", (0, 1))]
    assert {row.path: row.values for row in found.recipe} == {
        "precision.mode": (("fp32",), ("bf16",)),
        "name": (("small",), ("other",)),
    }


def test_runs_of_one_group_are_compared_with_each_other(tmp_path):
    found = compared(*seeded(tmp_path, "fp32", [0.9, 0.91, 0.92]))
    assert found.alike
    assert [len(side.runs) for side in found.sides] == [1, 1, 1]
    assert found.verdicts == ()
    assert found.together.mean == pytest.approx(0.91)
    assert [row.path for row in found.recipe] == ["train.seed"]


@pytest.mark.parametrize(
    ("ours", "theirs", "significant"),
    [
        ([0.90, 0.91, 0.92], [0.95, 0.961, 0.97], True),
        ([0.90, 0.91, 0.92], [0.93, 0.89, 0.92], False),
        ([0.90], [0.99], None),
        ([0.90, 0.91], [0.99], None),
    ],
)
def test_a_difference_is_more_than_seed_noise_or_not_or_nobody_can_tell(
    tmp_path, ours, theirs, significant
):
    paths = seeded(tmp_path, "a", ours) + seeded(tmp_path, "b", theirs, "optim.lr=0.2")
    (verdict,) = compared(*paths).verdicts
    assert verdict.is_significant is significant
    assert (verdict.side, verdict.reference) == ("B", "A")
    if significant is None:
        assert verdict.why_not.startswith("one seed of ")


def test_runs_that_did_not_finish_do_not_count(tmp_path):
    paths = seeded(tmp_path, "a", [0.9, 0.91])
    bad = make_run(
        tmp_path / "bad", "train.seed=2", status="diverged", done=3, metrics={"accuracy": 0.1}
    )
    short = make_run(tmp_path / "short", "train.seed=2", status=None, done=3, steps=10)
    others = seeded(tmp_path, "b", [0.9, 0.92], "optim.lr=0.2")
    found = compared(*paths, bad, short, *others)
    accuracy = next(measure for measure in found.measures if measure.name == "accuracy")
    sides = {side.label: side for side in found.sides}
    assert [len(side.runs) for side in sides.values()] == [3, 1, 2]  # `bad` is of 100 steps
    assert sides["A"].scores("eval", "accuracy") == {0: 0.9, 1: 0.91}
    assert accuracy.sides[1].mean == 0.1  # all that there is of it
    verdict = next(one for one in found.verdicts if one.side == "B")
    assert verdict.why_not == "no finished run of B has it"


def test_several_comparisons_are_adjusted(tmp_path):
    paths = seeded(tmp_path, "a", [0.90, 0.91, 0.92])
    for number, shift in ((1, 0.02), (2, 0.03)):
        values = [0.90 + shift, 0.911 + shift, 0.925 + shift]
        paths += seeded(tmp_path, f"b{number}", values, f"optim.lr=0.{number + 1}")
    for verdict in compared(*paths).verdicts:
        assert verdict.p_holm == pytest.approx(2 * verdict.difference.p, rel=0.5)
        assert verdict.p_holm >= verdict.difference.p


def test_only_what_was_tested_counts_as_a_comparison(tmp_path):
    paths = seeded(tmp_path, "a", [0.90, 0.91, 0.92])
    paths += seeded(tmp_path, "b", [0.95, 0.961, 0.97], "optim.lr=0.2")
    paths += seeded(tmp_path, "c", [0.95], "optim.lr=0.3")
    assert not any("Holm" in sentence for sentence in _sentences(compared(*paths)))
    paths += seeded(tmp_path, "d", [0.95, 0.961, 0.97], "optim.lr=0.4")
    said = [sentence for sentence in _sentences(compared(*paths)) if "Holm" in sentence]
    assert len(said) == 2 and all("(Holm, 2 comparisons)" in sentence for sentence in said)


def test_a_small_p_among_several_is_chance(tmp_path):
    paths = seeded(tmp_path, "a", [0.90, 0.91, 0.92])
    for number in range(3):
        values = [0.9139, 0.93, 0.9461]
        paths += seeded(tmp_path, f"b{number}", values, f"optim.lr=0.{number + 2}")
    found = compared(*paths).verdicts
    assert [verdict.difference.p for verdict in found] == pytest.approx([0.03] * 3, abs=0.002)
    assert [verdict.p_holm for verdict in found] == pytest.approx([0.09] * 3, abs=0.006)
    assert [verdict.is_significant for verdict in found] == [False] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e100])
def test_seeds_without_a_finite_metric_are_left_out_and_told(tmp_path, bad):
    paths = seeded(tmp_path, "a", [0.90, 0.91, 0.92])
    paths += seeded(tmp_path, "b", [0.95, 0.961, bad], "optim.lr=0.2")
    found = compared(*paths)
    a, b = found.sides
    assert (a.left_out("eval", "accuracy"), b.left_out("eval", "accuracy")) == ((), (2,))
    left_out, unpaired, verdict = _sentences(found)
    assert left_out == "B: seed 2 has no finite eval accuracy and is left out"
    assert unpaired == "seed 2 of A has no partner in B: left out of the test"
    assert "paired over 2 seeds" in verdict
    assert [side["left_out"] for side in as_object(found)["sides"]] == [(), (2,)]
    lacks = make_run(tmp_path / "lacks", "train.seed=3", done=10, steps=10)
    (a, _) = compared(*paths, lacks).sides
    assert a.left_out("eval", "accuracy") == (3,)


def test_seeds_that_have_no_partner_are_told(tmp_path):
    a = seeded(tmp_path, "a", [0.90, 0.91, 0.92, 0.93])
    b = seeded(tmp_path, "b", [0.95, 0.961], "optim.lr=0.2")
    assert _sentences(compared(*a, *b))[0] == (
        "seeds 2 and 3 of A have no partner in B: left out of the test"
    )
    assert _sentences(compared(*b, *a))[0] == (
        "seeds 2 and 3 of B have no partner in A: left out of the test"
    )
    assert _sentences(compared(*a, b[0]))[0] == (
        "seeds 1, 2 and 3 of A have no partner in B: left out of the difference"
    )
    (verdict,) = _sentences(compared(*a[2:], *b))  # none has one: Welch's test is of all
    assert "over all seeds" in verdict


def test_environments_and_plans_differ_by_path_and_not_by_what_was_measured(tmp_path):
    other = json.loads(json.dumps(ENVIRONMENT))
    other["versions"]["torch"] = "2.15.0"
    other["devices"][0]["threads"] = 1
    other["precisions"]["cpu"]["fp16"]["relative_time"] = 1.0
    a = make_run(tmp_path / "a", done=1)
    b = make_run(tmp_path / "b", "precision.mode=bf16", done=1, environment=other, device="cuda")
    found = compared(a, b)
    assert [row.path for row in found.environment] == ["versions.torch", "devices.0.threads"]
    assert {row.path: row.values for row in found.plan} == {
        "device": (("cpu",), ("cuda",)),
        "modules.conv.computed": (("fp32",), ("bf16",)),
    }


def curve(path: Path, losses: dict[int, float], planned: int | None = None):
    """The curve of a run with these losses by step."""
    path.mkdir()
    text = "".join(row(step, loss=loss).to_json() + "\n" for step, loss in losses.items())
    (path / "steps.jsonl").write_text(text)
    return read_curve(RunDirectory(path), planned)


def test_tenths_are_of_the_planned_run(tmp_path):
    found = curve(tmp_path / "a", {step: float(step) for step in range(1, 11)}, planned=20)
    assert tenths([found]) == (1.5, 3.5, 5.5, 7.5, 9.5, None, None, None, None, None)
    other = curve(tmp_path / "b", dict.fromkeys(range(1, 3), 0.0))  # each half of its run
    assert tenths([other]) == (None, None, None, None, 0.0, None, None, None, None, 0.0)
    assert tenths([found, other])[4] == 4.75


def test_where_curves_part_and_where_they_are_farthest_apart(tmp_path):
    losses = dict.fromkeys(range(1, 9), 1.0)
    a = curve(tmp_path / "a", losses)
    b = curve(tmp_path / "b", losses | {4: 1.5, 6: 3.0, 7: float("nan"), 99: 9.0})
    found = apart([b], [a])
    assert (found.common, found.first, found.step) == (8, 4, 6)
    assert (found.loss, found.reference) == (3.0, 1.0)
    assert apart([a], [a]).first is None
    nan = curve(tmp_path / "nan", dict.fromkeys(range(1, 4), float("nan")))
    assert apart([nan], [nan]).first is None
    assert apart([nan], [a]).step is None
    assert apart([curve(tmp_path / "none", {})], [a]).common == 0


def test_the_mean_curve_of_a_group_is_compared(tmp_path):
    one, two = curve(tmp_path / "1", {1: 1.0, 2: 2.0}), curve(tmp_path / "2", {1: 3.0})
    assert apart([one, two], [curve(tmp_path / "3", {1: 0.0, 2: 0.0})]).loss == 2.0
    assert np.isclose(tenths([one, two])[9], 2.5)


def test_rows_with_impossible_steps_are_left_out(tmp_path):
    found = curve(tmp_path / "a", {1: 1.0, 10**300: 2.0, -5: 3.0})
    assert list(found.step) == [1]


def test_kept_findings_are_read_with_patience(tmp_path):
    path = make_run(tmp_path / "a", done=1)
    assert read_run(path).findings is None
    findings = [{"id": "underflow", "severity": "error", "new": 1, "layers": ["conv"]}, {}, 7]
    (path / "diagnosis.json").write_text(json.dumps({"findings": findings}))
    (found,) = read_run(path).findings
    assert (found.id, found.severity, found.layers) == ("underflow", "error", ("conv",))
