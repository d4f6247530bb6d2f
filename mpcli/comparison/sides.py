"""What is compared: runs, and groups of those that differ only in their seed."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcli.comparison.curves import NO_CURVE, Curve, read_curve
from mpcli.comparison.differences import Flat, flat, without_times
from mpcli.recipe.errors import UserError
from mpcli.recipe.load import recorded_values
from mpcli.records import ForeignRun, Plan, Result
from mpcli.rundir import RunDirectory
from mpcli.significance import standard_error
from mpcli.states import Metrics, Overview, metrics_of, overview, state_of

_LARGEST = 1e100  # that a mean and its standard error can be worked out of


@dataclass(frozen=True)
class KeptFinding:
    """One of a `diagnosis.json`."""

    id: str
    severity: str
    cause: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class ComparedRun:
    """Everything of a run that is compared. What cannot be read is None.

    Attributes:
        is_foreign: it was recorded, and its settings stand for a recipe.
        seed: None where nothing says it.
        findings: None where no diagnosis is kept in the run directory.
    """

    path: Path
    about: Overview
    is_foreign: bool
    recipe: Flat | None
    seed: int | None
    environment: Flat | None
    plan: Flat | None
    metrics: Metrics
    curve: Curve
    peak_memory_bytes: int | None
    findings: tuple[KeptFinding, ...] | None

    @property
    def is_finished(self) -> bool:
        """Whether its metrics are those of a whole run."""
        return self.about.state in ("done", "recorded")

    def measure(self, split: str, name: str) -> float | None:
        """A metric, if it has it."""
        return self.metrics.get(split, {}).get(name)


@dataclass(frozen=True)
class Spread:
    """A number over the seeds of a side."""

    mean: float
    standard_error: float | None
    seeds: int


@dataclass(frozen=True)
class Side:
    """A run, or several whose recipes differ in `train.seed` and nothing else."""

    label: str
    runs: tuple[ComparedRun, ...]

    @property
    def counted(self) -> tuple[ComparedRun, ...]:
        """The runs whose numbers count: those that are finished, if any are."""
        return tuple(run for run in self.runs if run.is_finished) or self.runs

    @property
    def seeds(self) -> tuple[int, ...]:
        """That its runs have, each once."""
        return tuple(dict.fromkeys(run.seed for run in self.runs if run.seed is not None))

    def by_seed(self, of: Callable[[ComparedRun], float | None]) -> dict[int, float]:
        """A number of the runs that count, where it is finite; of the same seed the mean."""
        found: dict[int, list[float]] = {}
        for run in self.counted:
            if (value := of(run)) is not None:
                found.setdefault(-1 if run.seed is None else run.seed, []).append(value)
        return {
            seed: statistics.fmean(values)
            for seed, values in found.items()
            if all(abs(value) < _LARGEST for value in values)  # which NaN is not
        }

    def scores(self, split: str, name: str) -> dict[int, float]:
        """A metric by seed, of finished runs only."""
        if not any(run.is_finished for run in self.runs):
            return {}
        return self.by_seed(lambda run: run.measure(split, name))

    def left_out(self, split: str, name: str) -> tuple[int, ...]:
        """Seeds of finished runs whose metric is not finite, or not there while others have it."""
        known = self.scores(split, name)
        return tuple(
            seed
            for seed in self.seeds
            if seed not in known
            and any(
                run.seed == seed
                and run.is_finished
                and (known or run.measure(split, name) is not None)
                for run in self.runs
            )
        )

    def spread(self, of: Callable[[ComparedRun], float | None]) -> Spread | None:
        """A number over its seeds, if any run has it."""
        return spread(list(self.by_seed(of).values()))


def read_run(path: Path) -> ComparedRun:
    """A run directory, whatever is missing in it.

    Raises:
        UserError: exit 2, it is none.
    """
    about = overview(path)
    try:
        run = RunDirectory.read(path)
        foreign = run.foreign()
        result = state_of(run)[1]
    except UserError:
        if not _is_damaged(RunDirectory(path)):
            raise
        return _unreadable(about)
    plan = _plan(run)
    recipe = _settings(foreign) if foreign else _recipe(run)
    peaks = [row.memory_peak_bytes for row in run.last_steps(1)]
    environment = flat(run.environment())
    return ComparedRun(
        path=path,
        about=about,
        is_foreign=foreign is not None,
        recipe=recipe,
        seed=_seed(recipe),
        environment=without_times(environment) or None,
        plan=_plan_values(plan) if plan else None,
        metrics=metrics_of(run, result),
        curve=read_curve(run, about.planned_steps),
        peak_memory_bytes=_peak(result, peaks),
        findings=_findings(run.diagnosis()),
    )


def _is_damaged(run: RunDirectory) -> bool:
    """Whether what cannot be read is a run, and not something else."""
    with contextlib.suppress(OSError):
        try:
            is_ours_or_foreign = run.recipe_path.is_file() or run.foreign() is not None
        except UserError:  # there is something that says nothing
            is_ours_or_foreign = True
        return is_ours_or_foreign and os.path.lexists(run.attempt_path.parent)
    return False


def _unreadable(about: Overview) -> ComparedRun:
    """A run in which something lies that must not."""
    return ComparedRun(
        path=about.path,
        about=about,
        is_foreign=False,
        recipe=None,
        seed=None,
        environment=None,
        plan=None,
        metrics={},
        curve=NO_CURVE,
        peak_memory_bytes=None,
        findings=None,
    )


def sides_of(runs: Sequence[ComparedRun]) -> tuple[Side, ...]:
    """Groups in the order of their first runs; where all are of one group, each run for itself."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    found = list(groups.values()) if len(groups) > 1 else [[run] for run in runs]
    labels = _labels()
    return tuple(Side(next(labels), tuple(group)) for group in found)


def are_alike(runs: Sequence[ComparedRun]) -> bool:
    """Whether all runs have one recipe, but for the seed."""
    return len({_identity(run) for run in runs}) == 1


def spread(values: Sequence[float]) -> Spread | None:
    """Of one value for each seed."""
    if not values:
        return None
    return Spread(statistics.fmean(values), standard_error(values), len(values))


def _identity(run: ComparedRun) -> str:
    """The same for runs that differ in nothing but the seed, and in what they are called."""
    if run.recipe is None or run.seed is None:
        return str(run.path)
    values = {path: run.recipe[path] for path in run.recipe if path not in ("train.seed", "name")}
    return json.dumps(values, sort_keys=True)


def _labels() -> Iterator[str]:
    """A, B, ... Z, AA, AB, ..."""
    letters = string.ascii_uppercase
    yield from letters
    yield from (first + label for first in _labels() for label in letters)


def _settings(foreign: ForeignRun) -> Flat:
    """What stands for a recipe where there is none."""
    return flat(foreign.model_dump(exclude={"version", "modules", "every"}))


def _recipe(run: RunDirectory) -> Flat | None:
    try:
        return flat(recorded_values(run.recipe_path))
    except UserError:
        return None


def _seed(recipe: Flat | None) -> int | None:
    seed = recipe.get("train.seed") if recipe else None
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def _plan(run: RunDirectory) -> Plan | None:
    try:
        return run.plan()
    except (OSError, ValueError):
        return None


def _plan_values(plan: Plan) -> Flat:
    """Modules and warnings by name."""
    values = plan.model_dump(mode="json", exclude={"version", "modules", "warnings"})
    modules = plan.model_dump(mode="json", include={"modules": {"__all__": _TYPES}})["modules"]
    named = {found.pop("name") or "(the model)": found for found in modules}
    warnings = {warning.path: warning.message for warning in plan.warnings}
    return flat(values | {"modules": named, "warnings": warnings})


_TYPES = {"name", "type", "parameters", "stored", "computed", "gradient", "master"}


def _peak(result: Result | None, peaks: Sequence[int]) -> int | None:
    known = [result.peak_memory_bytes] if result else list(peaks)
    return max(known, default=0) or None


def _findings(diagnosis: Mapping[str, Any]) -> tuple[KeptFinding, ...] | None:
    """Read with patience: an older or a newer mptrain may have written them."""
    found = diagnosis.get("findings")
    if not isinstance(found, list):
        return None
    kept = []
    for about in found:
        if isinstance(about, dict) and isinstance(about.get("id"), str):
            layers = about.get("layers")
            kept.append(
                KeptFinding(
                    id=about["id"],
                    severity=str(about.get("severity", "")),
                    cause=str(about.get("cause", "")),
                    layers=tuple(map(str, layers)) if isinstance(layers, list) else (),
                )
            )
    return tuple(kept)
