"""What runs with the same seeds say about settings: means, standard errors, paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpcli.sweep.results import TrialResult

METRICS = ("accuracy", "f1", "masked_accuracy")
"""What a setting is judged by: the first that a task has, more is better; else the loss."""
LEVEL = 0.05
"""A difference whose p value is below is called significant."""
ROUNDING = 1e-9
"""Relative: differences of float64 scores that are no further apart are the same."""


def metric_of(trials: Iterable[TrialResult]) -> str:
    """The name of the metric that these runs are judged by."""
    known = {name for trial in trials for name in trial.metrics}
    return next((name for name in METRICS if name in known), "loss")


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean: the sample's standard deviation over sqrt(n); None of less than two."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Difference:
    """Of pairs with the same seed.

    Attributes:
        mean: of the differences; None without a pair.
        standard_error: of that mean; None with less than two pairs.
        p: of a two-sided paired t-test (Student, 1908) that the mean is zero; None as well, and
            where all differences are the same but for rounding, as they say nothing of chance.
        pairs: how many there are.
    """

    mean: float | None
    standard_error: float | None
    p: float | None
    pairs: int


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """`values` minus `reference`, both by seed; seeds that only one has are left out."""
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    if not differences:
        return Difference(None, None, None, 0)
    mean, error = statistics.fmean(differences), standard_error(differences)
    return Difference(mean, error, _p_value(differences), len(differences))


def _p_value(differences: Sequence[float]) -> float | None:
    if len(differences) < 2:
        return None
    if not any(differences):
        return 1.0
    if max(differences) - min(differences) <= ROUNDING * max(map(abs, differences)):
        return None
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values adjusted for how many there are (Holm, 1979); None stays and is not counted."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted


def precision_rows(trials: Sequence[TrialResult]) -> tuple[dict[str, Any], ...]:
    """One row for each mode, beside fp32 or, without it, the first one."""
    groups = _grouped(trials)
    metric = metric_of(trials)
    scores = {mode: _scores(group, metric) for mode, group in groups.items()}
    reference = "fp32" if "fp32" in groups else next(iter(groups))
    others = [mode for mode in groups if mode != reference]
    differences = {mode: paired(scores[mode], scores[reference]) for mode in others}
    corrected = holm([differences[mode].p for mode in others])
    adjusted = dict(zip(others, corrected, strict=True))
    plain = {mode: _about(group, metric) for mode, group in groups.items()}
    beside = plain[reference]
    rows = []
    for mode in groups:
        row = {"mode": mode, "reference": reference, **plain[mode]}
        for name in ("seconds_per_step", "peak_memory_bytes"):
            row[f"{name}_ratio"] = _ratio(row[name], beside[name])
        if mode != reference:
            difference, p = differences[mode], adjusted[mode]
            row |= {
                "difference": difference.mean,
                "difference_standard_error": difference.standard_error,
                "pairs": difference.pairs,
                "p": difference.p,
                "p_holm": p,
                "significant": None if p is None else p < LEVEL,
            }
        rows.append(row)
    return tuple(rows)


def grid_rows(
    trials: Sequence[TrialResult], settings: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Any], ...]:
    """One row for each setting, the best first; those without a finished run last.

    Args:
        settings: label -> the `path=value` of that point of the grid.
    """
    metric = metric_of(trials)
    rows = [
        {"set": list(settings[label]), **_about(group, metric)}
        for label, group in _grouped(trials).items()
    ]

    def rank(row: Mapping[str, Any]) -> tuple[int, float]:
        # Fewer of its seeds finished: the mean is of those that did not fail, so it comes later.
        failed = row["runs"] - row["finished"]
        value = row["mean"]
        if value is None:
            return row["runs"] + 1, 0.0
        return failed, value if metric == "loss" else -value

    return tuple(sorted(rows, key=rank))


def _grouped(trials: Iterable[TrialResult]) -> dict[str, list[TrialResult]]:
    groups: dict[str, list[TrialResult]] = {}
    for trial in trials:
        groups.setdefault(trial.label, []).append(trial)
    return groups


def _scores(group: Iterable[TrialResult], metric: str) -> dict[int, float]:
    """By seed, of the runs that finished with one that is finite."""
    return {
        trial.seed: trial.metrics[metric]
        for trial in group
        if trial.status == "done" and math.isfinite(trial.metrics.get(metric, math.nan))
    }


def _about(group: Sequence[TrialResult], metric: str) -> dict[str, Any]:
    scores = _scores(group, metric)
    values = list(scores.values())
    seconds = [t.seconds_per_step for t in group if t.seconds_per_step is not None]
    reasons = [_reason(trial, metric) for trial in group if trial.seed not in scores]
    return {
        "metric": metric,
        "mean": statistics.fmean(values) if values else None,
        "standard_error": standard_error(values),
        "runs": len(group),
        "finished": len(values),
        "failed": list(dict.fromkeys(reasons)),
        "skipped": statistics.fmean(trial.skipped for trial in group),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "peak_memory_bytes": max(trial.peak_memory_bytes for trial in group) or None,
    }


def _reason(trial: TrialResult, metric: str) -> str:
    """Why a run has no score."""
    if trial.status == "done":
        return f"done without a finite {metric}"
    return f"{trial.status}: {trial.reason}" if trial.reason else trial.status


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference
