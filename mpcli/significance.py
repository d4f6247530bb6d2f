"""Whether a difference is more than noise: means over seeds, standard errors, t-tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.05
"""A difference whose p value is below is called significant."""
ROUNDING = 1e-9
"""Relative: differences of float64 scores that are no further apart are the same."""


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean: the sample's standard deviation over sqrt(n); None of less than two."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Difference:
    """Of two means over seeds.

    Attributes:
        mean: of the differences; None without values.
        standard_error: of that mean; None where a test needs more seeds.
        p: of a two-sided test that the mean is zero; None as well, and where all differences are
            the same but for rounding, as they say nothing of chance.
        test: paired over `pairs` seeds that both have (Student, 1908), or between all seeds of
            both (Welch, 1947).
    """

    mean: float | None
    standard_error: float | None = None
    p: float | None = None
    test: Literal["paired", "welch"] | None = None
    pairs: int = 0


def difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """`values` minus `reference`, both by seed: paired where both have two seeds in common."""
    common = [seed for seed in values if seed in reference]
    if len(common) >= 2:
        return paired(values, reference)
    if len(values) >= 2 and len(reference) >= 2:
        return _welch(list(values.values()), list(reference.values()))
    if common:
        return paired(values, reference)
    if values and reference:
        return Difference(statistics.fmean(values.values()) - statistics.fmean(reference.values()))
    return Difference(None)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """`values` minus `reference`, both by seed; seeds that only one has are left out."""
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    if not differences:
        return Difference(None)
    mean, error = statistics.fmean(differences), standard_error(differences)
    if error is None:
        return Difference(mean, pairs=len(differences))
    p: float | None = _p_value(mean / error, len(differences) - 1) if error else None
    if not any(differences):
        p = 1.0
    elif max(differences) - min(differences) <= ROUNDING * max(map(abs, differences)):
        p = None
    return Difference(mean, error, p, "paired", len(differences))


def _welch(values: Sequence[float], reference: Sequence[float]) -> Difference:
    mean = statistics.fmean(values) - statistics.fmean(reference)
    ours, theirs = standard_error(values) or 0.0, standard_error(reference) or 0.0
    error = math.hypot(ours, theirs)
    if error == 0:
        return Difference(mean, error, None if mean else 1.0, "welch")
    a, b = (ours / error) ** 4, (theirs / error) ** 4
    freedom = 1 / (a / (len(values) - 1) + b / (len(reference) - 1))  # Welch-Satterthwaite
    return Difference(mean, error, _p_value(mean / error, freedom), "welch")


def _p_value(t: float, freedom: float) -> float:
    """Of a two-sided test."""
    from scipy.special import stdtr  # a third of the time that scipy.stats takes to import

    return 2 * float(stdtr(freedom, -abs(t)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values adjusted for how many there are (Holm, 1979); None stays and is not counted."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted
