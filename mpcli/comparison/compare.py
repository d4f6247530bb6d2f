"""Runs beside each other: everything that `mptrain compare` shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from mpcli.comparison.curves import Apart, apart, tenths
from mpcli.comparison.differences import Differing, Flat, differing
from mpcli.comparison.sides import ComparedRun, Side, Spread, are_alike, sides_of, spread
from mpcli.comparison.verdict import Split, Verdict, common_metric, verdicts

Facts = Literal["recipe", "environment", "plan"]
"""What is said of a run before it has steps."""


@dataclass(frozen=True)
class Measure:
    """A number of each side.

    Attributes:
        split: of a metric; None of other numbers.
    """

    name: str
    split: Split | None
    sides: tuple[Spread | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Several runs beside each other.

    Attributes:
        alike: all runs have one recipe but for the seed, so each is a side of its own.
        unknown: the sides with a run of which that is not known.
        tenths: of each side, the mean loss of each tenth of the run.
        apart: of each side but the first, its mean curve beside that of the first.
        together: the metric over all runs, where they are alike.
    """

    sides: tuple[Side, ...]
    alike: bool
    recipe: tuple[Differing, ...]
    environment: tuple[Differing, ...]
    plan: tuple[Differing, ...]
    unknown: Mapping[Facts, tuple[str, ...]]
    measures: tuple[Measure, ...]
    tenths: tuple[tuple[float | None, ...], ...]
    apart: tuple[Apart, ...]
    metric: tuple[Split, str] | None
    verdicts: tuple[Verdict, ...]
    together: Spread | None

    @property
    def recipe_unknown(self) -> bool:
        """Whether nobody can say that all have the same recipe, or that they have not."""
        return not self.recipe and bool(self.unknown["recipe"])


def compare(runs: Sequence[ComparedRun]) -> Comparison:
    """Two runs or more beside each other."""
    sides, alike = sides_of(runs), are_alike(runs)
    grouped = any(len(side.runs) > 1 for side in sides)
    facts: dict[Facts, list[list[Flat | None]]] = {
        "recipe": _recipes(sides),
        "environment": [[run.environment for run in side.runs] for side in sides],
        "plan": [[run.plan for run in side.runs] for side in sides],
    }
    metric = common_metric(sides)
    curves = [[run.curve for run in side.counted] for side in sides]
    return Comparison(
        sides=sides,
        alike=alike,
        # Seeds of groups stand beside the runs.
        recipe=tuple(
            row for row in differing(facts["recipe"]) if not (grouped and row.path == "train.seed")
        ),
        environment=tuple(differing(facts["environment"])),
        plan=tuple(differing(facts["plan"])),
        unknown={
            of: tuple(s.label for s, known in zip(sides, values, strict=True) if None in known)
            for of, values in facts.items()
        },
        measures=tuple(_measures(sides)),
        tenths=tuple(tenths(side) for side in curves),
        apart=tuple(apart(side, curves[0]) for side in curves[1:]),
        metric=metric,
        verdicts=verdicts(sides, *metric) if metric and not alike else (),
        together=_together(runs, metric) if alike else None,
    )


def _recipes(sides: Sequence[Side]) -> list[list[Flat | None]]:
    """Of runs that are not ours their settings, unless there is a recipe to hold them to."""
    has_recipe = any(not run.is_foreign for side in sides for run in side.runs)
    return [
        [None if has_recipe and run.is_foreign else run.recipe for run in side.runs]
        for side in sides
    ]


def _together(runs: Sequence[ComparedRun], metric: tuple[Split, str] | None) -> Spread | None:
    """Over seeds, of which each counts once."""
    if metric is None:
        return None
    return spread(list(Side("", tuple(runs)).scores(*metric).values()))


def _measures(sides: Sequence[Side]) -> list[Measure]:
    names: dict[tuple[Split, str], None] = {}
    for split in _SPLITS:
        for side in sides:
            for run in side.counted:
                names |= dict.fromkeys((split, name) for name in run.metrics.get(split, {}))
    measures = {
        (name, split): partial(ComparedRun.measure, split=split, name=name) for split, name in names
    }
    of_each = measures | {(name, None): of for name, of in _NUMBERS.items()}
    found = [
        Measure(name, split, tuple(side.spread(of) for side in sides))
        for (name, split), of in of_each.items()
    ]
    return [measure for measure in found if any(measure.sides)]


_SPLITS: tuple[Split, ...] = ("eval", "train")


def _median_speed(run: ComparedRun) -> float | None:
    speeds = run.curve.samples_per_second
    return float(np.median(speeds)) if len(speeds) else None


def _last_scale(run: ComparedRun) -> float | None:
    return float(run.curve.scale[-1]) if len(run.curve.scale) else None


def _least_scale(run: ComparedRun) -> float | None:
    return float(run.curve.scale.min()) if len(run.curve.scale) else None


_NUMBERS: dict[str, Callable[[ComparedRun], float | None]] = {
    "steps": lambda run: run.about.steps,
    "skipped": lambda run: run.curve.skipped,
    "scale at the end": _last_scale,
    "least scale": _least_scale,
    "time": lambda run: run.about.wall_seconds,
    "samples/s": _median_speed,
    "peak memory": lambda run: run.peak_memory_bytes,
}
