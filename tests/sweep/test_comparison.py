"""Means, standard errors and paired tests, beside what numpy and scipy say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mpcli.significance import holm, paired, standard_error
from mpcli.sweep.comparison import grid_rows, metric_of, precision_rows
from mpcli.sweep.results import TrialResult


def trial(label, seed=0, accuracy=None, *, status="done", **about):
    metrics = about.pop("metrics", {} if accuracy is None else {"loss": 1.0, "accuracy": accuracy})
    values = {
        "settings": (), "run": f"{label}-seed{seed}", "reason": None, "steps": 10, "skipped": 0,
        "first_loss": 2.0, "loss": 1.0, "seconds_per_step": 0.01, "peak_memory_bytes": 100,
    } | about  # fmt: skip
    return TrialResult(label=label, seed=seed, status=status, metrics=metrics, **values)


SCORES = {
    "fp32": [0.90, 0.91, 0.93, 0.92, 0.95],
    "bf16": [0.89, 0.91, 0.92, 0.90, 0.94],
    "fp16": [0.91, 0.90, 0.94, 0.91, 0.95],
}


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_the_standard_error_is_that_of_the_sample(values):
    direct = np.std(values, ddof=1) / math.sqrt(len(values))
    assert standard_error(values) == pytest.approx(direct, abs=1e-12)


def test_one_value_has_no_standard_error():
    assert standard_error([1.0]) is None
    assert standard_error([]) is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_same_difference_in_every_seed_is_not_tested(seeds):
    # 0.1, 0.2, ... + 0.01 differ by rounding alone
    reference = {seed: 0.1 * seed for seed in range(1, seeds + 1)}
    found = paired({seed: value + 0.01 for seed, value in reference.items()}, reference)
    assert found.mean == pytest.approx(0.01)
    assert found.p is None
    more = paired(
        {seed: value + 0.01 + 1e-6 * seed for seed, value in reference.items()}, reference
    )
    assert more.p is not None
    assert precision_rows(
        [trial(mode, seed, value + cost) for mode, cost in (("fp32", 0.0), ("fp16", 0.01))
         for seed, value in reference.items()]
    )[1]["significant"] is None  # fmt: skip


def test_holm_is_the_example_of_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_never_makes_a_difference_more_significant(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    assert sorted(adjusted) == [a for _, a in sorted(zip(p_values, adjusted, strict=True))]


def test_modes_are_compared_with_fp32_by_seed():
    trials = [
        trial(mode, seed, value, seconds_per_step=0.01 * 2**seed, peak_memory_bytes=memory - seed)
        for mode, memory in (("fp16", 50), ("fp32", 100), ("bf16", 50))
        for seed, value in enumerate(SCORES[mode])
    ]
    rows = {row["mode"]: row for row in precision_rows(trials)}
    assert list(rows) == ["fp16", "fp32", "bf16"]
    assert "difference" not in rows["fp32"]
    for mode in ("bf16", "fp16"):
        differences = np.subtract(SCORES[mode], SCORES["fp32"])
        row = rows[mode]
        assert row["metric"] == "accuracy" and row["reference"] == "fp32"
        assert row["mean"] == pytest.approx(np.mean(SCORES[mode]))
        assert row["standard_error"] == pytest.approx(stats.sem(SCORES[mode]))
        assert row["difference"] == pytest.approx(differences.mean())
        assert row["difference_standard_error"] == pytest.approx(stats.sem(differences))
        assert row["p"] == pytest.approx(stats.ttest_rel(SCORES[mode], SCORES["fp32"]).pvalue)
        assert row["seconds_per_step"] == 0.04
        assert row["peak_memory_bytes_ratio"] == 0.5
    by_hand = holm([rows["fp16"]["p"], rows["bf16"]["p"]])
    assert [rows["fp16"]["p_holm"], rows["bf16"]["p_holm"]] == by_hand
    assert rows["bf16"]["significant"] == (by_hand[1] < 0.05)


def test_a_cost_in_every_seed_is_significant_and_one_seed_says_nothing():
    many = [
        trial(mode, seed, 0.9 - cost * (1 + 0.1 * seed) - 0.01 * seed)
        for mode, cost in (("fp32", 0.0), ("fp16", 0.05))
        for seed in range(5)
    ]
    assert precision_rows(many)[1]["significant"] is True
    one = precision_rows([trial("fp32", 0, 0.9), trial("fp16", 0, 0.8)])[1]
    assert one["difference"] == pytest.approx(-0.1)
    assert one["difference_standard_error"] is one["p"] is one["significant"] is None


def test_without_fp32_the_first_mode_is_the_reference():
    rows = precision_rows([trial("bf16", 0, 0.9), trial("fp16", 0, 0.8)])
    assert [row["reference"] for row in rows] == ["bf16", "bf16"]


def test_runs_without_a_result_are_left_out_of_the_pairs_and_named():
    trials = [
        *(trial("fp32", seed, 0.9 + 0.01 * seed) for seed in range(3)),
        trial("fp16", 0, 0.8),
        trial("fp16", 1, 0.1, status="diverged", reason="the loss is NaN"),
        trial("fp16", 2, float("nan")),
    ]
    row = precision_rows(trials)[1]
    assert (row["runs"], row["finished"], row["pairs"]) == (3, 1, 1)
    assert row["mean"] == 0.8
    assert row["failed"] == ["diverged: the loss is NaN", "done without a finite accuracy"]


def test_modes_that_never_finish_have_empty_cells():
    rows = precision_rows([trial("fp32", 0, 0.9), trial("fp16", 0, status="diverged")])
    assert rows[1]["mean"] is rows[1]["difference"] is None


@pytest.mark.parametrize(
    ("metrics", "metric"),
    [
        ({"loss": 1.0, "f1": 0.5, "accuracy": 0.4}, "accuracy"),
        ({"loss": 1.0, "f1": 0.5}, "f1"),
        ({"loss": 1.0, "perplexity": 2.0, "masked_accuracy": 0.1}, "masked_accuracy"),
        ({"loss": 1.0, "perplexity": 2.0}, "loss"),
        ({}, "loss"),
    ],
)
def test_a_task_is_judged_by_its_first_known_metric(metrics, metric):
    assert metric_of([trial("a", metrics=metrics)]) == metric


def test_settings_of_a_grid_are_ranked_the_best_first():
    settings = {"lr=1": ["lr=1"], "lr=2": ["lr=2"], "lr=3": ["lr=3"], "lr=4": ["lr=4"]}
    trials = [
        *(trial("lr=1", seed, 0.8 + 0.1 * seed) for seed in (0, 1)),
        *(trial("lr=2", seed, 0.9 + 0.05 * seed) for seed in (0, 1)),
        *(trial("lr=3", seed, status="diverged") for seed in (0, 1)),
        trial("lr=4", 0, 0.99), trial("lr=4", 1, status="diverged"),
    ]  # fmt: skip
    rows = grid_rows(trials, settings)
    assert [row["set"] for row in rows] == [["lr=2"], ["lr=1"], ["lr=4"], ["lr=3"]]
    assert rows[0]["mean"] == pytest.approx(0.925)
    assert rows[0]["standard_error"] == pytest.approx(0.025)


def test_the_smallest_loss_is_the_best():
    trials = [trial("a", metrics={"loss": 2.0}), trial("b", metrics={"loss": 1.0})]
    assert grid_rows(trials, {"a": ["a"], "b": ["b"]})[0]["set"] == ["b"]
