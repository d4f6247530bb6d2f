"""What runs with the same seeds say about settings: means, standard errors, paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpcli.significance import LEVEL, holm, paired, standard_error
from mpcli.states import METRICS
from mpcli.sweep.results import TrialResult


def metric_of(trials: Iterable[TrialResult]) -> str:
    """The name of the metric that these runs are judged by."""
    known = {name for trial in trials for name in trial.metrics}
    return next((name for name in METRICS if name in known), "loss")


def precision_rows(
    trials: Sequence[TrialResult], memory: Mapping[str, int] | None = None
) -> tuple[dict[str, Any], ...]:
    """One row for each mode, beside fp32 or, without it, the first one.

    Args:
        memory: mode -> bytes of its plan's peak, where what runs measured says little.
    """
    groups = _grouped(trials)
    metric = metric_of(trials)
    scores = {mode: _scores(group, metric) for mode, group in groups.items()}
    reference = "fp32" if "fp32" in groups else next(iter(groups))
    others = [mode for mode in groups if mode != reference]
    differences = {mode: paired(scores[mode], scores[reference]) for mode in others}
    corrected = holm([differences[mode].p for mode in others])
    adjusted = dict(zip(others, corrected, strict=True))
    plain = {
        mode: _about(group, metric)
        | ({"peak_memory_bytes": memory[mode]} if memory and mode in memory else {})
        for mode, group in groups.items()
    }
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
