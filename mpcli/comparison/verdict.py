"""Whether the metric of one side differs from that of another by more than seed noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mpcli.comparison.sides import Side
from mpcli.significance import LEVEL, Difference, difference, holm
from mpcli.states import METRICS

Split = Literal["eval", "train"]


@dataclass(frozen=True)
class Verdict:
    """Of a side beside the first one.

    Attributes:
        p_holm: `difference.p`, adjusted for the number of sides that are beside the first.
        is_significant: whether that is more than seed noise; None where nobody can tell.
        why_not: why nobody can tell.
        unpaired: the seeds by side that the other one has not, where seeds are paired.
    """

    side: str
    reference: str
    difference: Difference
    p_holm: float | None
    is_significant: bool | None
    why_not: str | None = None
    unpaired: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def common_metric(sides: Iterable[Side]) -> tuple[Split, str] | None:
    """The metric that all sides can be judged by; else the first that any of them has."""
    candidates: list[tuple[Split, str]] = [("eval", name) for name in (*METRICS, "loss")]
    candidates.append(("train", "loss"))
    known = [
        {
            metric
            for metric in candidates
            for run in side.counted
            if run.measure(*metric) is not None
        }
        for side in sides
    ]
    shared, any_of_them = set.intersection(*known), set.union(*known)
    return next((metric for metric in candidates if metric in (shared or any_of_them)), None)


def verdicts(sides: Sequence[Side], split: str, name: str) -> tuple[Verdict, ...]:
    """Of every side but the first, beside it."""
    reference, *others = sides
    beside = reference.scores(split, name)
    found = [difference(side.scores(split, name), beside) for side in others]
    adjusted = holm([one.p for one in found])
    return tuple(
        Verdict(
            side=side.label,
            reference=reference.label,
            difference=one,
            p_holm=p,
            is_significant=None if p is None else p < LEVEL,
            why_not=_why_not(one, side, reference, split, name) if p is None else None,
            unpaired=_unpaired(side, reference, split, name) if one.pairs else {},
        )
        for side, one, p in zip(others, found, adjusted, strict=True)
    )


def _unpaired(side: Side, reference: Side, split: str, name: str) -> dict[str, tuple[int, ...]]:
    ours, theirs = side.scores(split, name), reference.scores(split, name)
    alone = {
        reference.label: tuple(seed for seed in theirs if seed not in ours),
        side.label: tuple(seed for seed in ours if seed not in theirs),
    }
    return {label: seeds for label, seeds in alone.items() if seeds}


def _why_not(one: Difference, side: Side, reference: Side, split: str, name: str) -> str:
    if one.standard_error is not None:
        return "the same difference in every seed"
    for each in (reference, side):
        if not each.scores(split, name):
            return f"no finished run of {each.label} has it"
    single = [one.label for one in (reference, side) if len(one.scores(split, name)) < 2]
    return f"one seed of {' and of '.join(single)}"
