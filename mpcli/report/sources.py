"""What the paths of a report hold: runs, sweeps and diagnoses, read without believing any of it."""

from __future__ import annotations

import dataclasses
import filecmp
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpcli.comparison.differences import Flat, flat
from mpcli.diagnose.finding import Finding
from mpcli.recipe.errors import UserError, user_error
from mpcli.recipe.load import recorded_values
from mpcli.recipe.source import read_source
from mpcli.records import EvalRecord, ForeignRun, ModuleTypes, Plan, Result, RollbackRecord
from mpcli.report.layers import Layers, read_layers
from mpcli.report.steps import Steps, read_steps
from mpcli.rundir import RunDirectory
from mpcli.rundir.storage import known_object, read_object
from mpcli.states import Metrics, State, metrics_of, overview, state_of

MOST_TRIALS = 24
"""Of a sweep whose curves are shown."""


@dataclass(frozen=True)
class Diagnosis:
    """What `mptrain diagnose --json` said.

    Attributes:
        unread: findings that cannot be understood.
    """

    label: str
    of: str | None
    verdict: str
    findings: tuple[Finding, ...]
    unread: int


@dataclass(frozen=True)
class Attempt:
    """One of the processes, or groups of them, that trained a run one after the other."""

    number: int
    changes: tuple[str, ...]
    environment: Flat


@dataclass(frozen=True, eq=False)
class Run:
    """A run directory as far as it can be read.

    Attributes:
        wall_seconds: that it took so far; None where nobody knows.
        peak_memory_bytes: of its steps so far; None where nobody knows, or no machine has it.
        planned_peak: the same of its plan.
        values: of the recipe, or of a recorded loop's settings, by dotted path.
        missing: what a whole run has and this one has not, in words.
    """

    label: str
    path: Path
    state: State
    result: Result | None
    metrics: Metrics
    wall_seconds: float | None
    peak_memory_bytes: int | None
    foreign: ForeignRun | None
    values: Flat
    source: str | None
    attempts: tuple[Attempt, ...]
    plan: Plan | None
    planned_peak: int | None
    observed: dict[str, ModuleTypes]
    steps: Steps
    layers: Layers | None
    evaluations: tuple[EvalRecord, ...]
    rollbacks: tuple[RollbackRecord, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep's result; `rows` as its kind has them, nested values by dotted path."""

    label: str
    kind: str
    recommended: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]


@dataclass
class Sources:
    """Everything a report shows."""

    runs: list[Run] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)

    @property
    def charted(self) -> list[Run]:
        """The runs that have anything to draw; a run's place here is its colour."""
        return [run for run in self.runs if len(run.steps) or run.evaluations]


def read_sources(paths: Sequence[Path]) -> Sources:
    """Read what the paths name, each once; the labels tell them apart.

    Raises:
        UserError: exit 2, a path holds nothing that a report can show, or cannot be read.
    """
    found = Sources()
    each: dict[str, Path] = {}
    for path in paths:
        each.setdefault(os.path.realpath(path), path)
    paths = list(each.values())
    beside = [RunDirectory(path).diagnosis_path for path in paths]
    for path, label in zip(paths, _labels(paths), strict=True):
        try:
            _read(path, label, beside, found)
        except OSError as error:  # a name that is too long, what may not be read
            raise user_error(f"{error.filename or path}: {error.strerror}") from error
    return found


def _read(path: Path, label: str, beside: Sequence[Path], found: Sources) -> None:
    if _is_sweep(path):
        _read_sweep(path, label, found)
    elif path.is_file():
        if not any(_same(path, other) for other in beside):
            found.diagnoses.append(_diagnosis(path, label))
    else:
        _read_run(path, label, found)


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _labels(paths: Sequence[Path]) -> list[str]:
    """Paths without the folders that all of them lie in."""
    resolved = [
        Path(os.path.realpath(path)) if path.name == "latest" else path.absolute() for path in paths
    ]
    if len(resolved) == 1:
        common = resolved[0].parent.parent
    else:
        common = Path(os.path.commonpath([path.parent for path in resolved]))
    return [str(path.relative_to(common)) for path in resolved]


def _is_sweep(path: Path) -> bool:
    return (path / "study.json").is_file() or (path / "trials").is_dir()


def _read_run(path: Path, label: str, found: Sources) -> None:
    directory = RunDirectory.read(path)
    found.runs.append(_run(directory, label, with_layers=True))
    if directory.diagnosis_path.is_file():
        try:
            about = _diagnosis(directory.diagnosis_path, label)
            found.diagnoses.append(dataclasses.replace(about, of=None))
        except UserError as error:
            run = found.runs[-1]
            why = f"diagnosis.json: {_first(error, directory.diagnosis_path)}"
            found.runs[-1] = dataclasses.replace(run, missing=(*run.missing, why))


def _run(directory: RunDirectory, label: str, *, with_layers: bool) -> Run:
    missing: list[str] = []
    unread: Counter[str] = Counter()
    foreign = _try(directory.foreign, missing, "foreign.json")
    plan = None if foreign else _try(directory.plan, missing, "plan.json of the newest attempt")
    steps = read_steps(directory, unread)
    layers = read_layers(directory, unread) if with_layers else None
    values, source = _recipe(directory, missing) if not foreign else (_foreign(foreign), None)
    state, result = _state(directory, missing)
    if not len(steps):
        missing.append("steps.jsonl: no step was recorded")
    if layers and not layers.tensors:
        missing.append("layers.jsonl: no step was sampled")
    for name, count in unread.items():
        missing.append(f"{name}: {count:,} rows that cannot be read are left out")
    return Run(
        label=label,
        path=directory.path,
        state=state,
        result=result,
        metrics=metrics_of(directory, result),
        wall_seconds=result.wall_seconds if result else overview(directory.path).wall_seconds,
        peak_memory_bytes=_peak(result, steps),
        foreign=foreign,
        values=values,
        source=source,
        attempts=tuple(_attempts(directory)),
        plan=plan,
        planned_peak=_bytes(plan.memory.peak if plan and plan.memory else None),
        observed=directory.observed(),
        steps=steps,
        layers=layers,
        evaluations=tuple(row for row in directory.evaluations() if 0 <= row.step < 2**53),
        rollbacks=tuple(row for row in directory.rollbacks() if 0 <= row.step < 2**53),
        missing=tuple(missing),
    )


def _state(directory: RunDirectory, missing: list[str]) -> tuple[State, Result | None]:
    try:
        state, result = state_of(directory)
    except UserError:  # of a foreign.json, which is told already
        return "unreadable", None
    if state in ("running", "killed"):
        missing.append(f"result.json: the run {'goes on' if state == 'running' else 'was killed'}")
    elif state == "unreadable":
        missing.append("result.json: cannot be read")
    return state, result


def _peak(result: Result | None, steps: Steps) -> int | None:
    if result:
        return _bytes(result.peak_memory_bytes)
    return _bytes(int(steps["memory_peak_bytes"].max(initial=0)))


def _bytes(value: int | None) -> int | None:
    return value if value and 0 < value < 2**63 else None


def _try(read: Any, missing: list[str], name: str) -> Any:
    try:
        return read()
    except (OSError, ValueError, UserError):
        missing.append(f"{name}: is not there, or cannot be read")
        return None


def _recipe(directory: RunDirectory, missing: list[str]) -> tuple[Flat, str | None]:
    source = None
    try:
        if directory.source_path.is_file():
            source = read_source(directory.source_path, directory.source_path.name).text
        values = recorded_values(directory.recipe_path)
    except (OSError, UserError) as error:
        missing.append(f"the recipe: {_first(error, directory.path)}")
        return {}, source
    return flat(values), source


def _foreign(about: ForeignRun) -> Flat:
    facts = about.model_dump(exclude={"modules", "version", "settings"})
    return flat(facts | {"settings": dict(about.settings)})


def _attempts(directory: RunDirectory) -> Iterator[Attempt]:
    for number in range(1, min(directory.attempt, 1000) + 1):
        attempt = RunDirectory.join(directory.path, number, 0)
        if not attempt.attempt_path.is_dir():
            continue
        yield Attempt(number, attempt.changes(), flat(attempt.environment()))


def _diagnosis(path: Path, label: str) -> Diagnosis:
    found = read_object(path)
    raw = found.get("findings")
    if not isinstance(raw, list):
        hint = "a run directory, a sweep's folder, or what `mptrain diagnose --json` printed"
        raise user_error(f"{path}: no diagnosis: it has no findings", hint)
    findings, unread = [], 0
    for item in raw:
        try:
            findings.append(Finding.model_validate(item))
        except (ValidationError, RecursionError):
            unread += 1
    evidence = found.get("evidence")
    of = evidence.get("path") if isinstance(evidence, dict) else None
    verdict = found.get("verdict")
    return Diagnosis(
        label, of if isinstance(of, str) else None,
        verdict if isinstance(verdict, str) else "", tuple(findings), unread,
    )  # fmt: skip


def _read_sweep(path: Path, label: str, found: Sources) -> None:
    result, missing = known_object(path / "result.json"), []
    if not result:
        missing.append("result.json: the sweep goes on, or it was stopped")
    rows = result.get("rows")
    recommended = result.get("recommended")
    recommended = recommended if isinstance(recommended, dict) else {}
    names = {
        trial["run"]: f"{trial.get('label')}, seed {trial.get('seed')}"
        for trial in _ordered(_objects(result.get("trials")), recommended.get("set"))
        if isinstance(trial.get("run"), str)
    }
    places = {name: place for place, name in enumerate(names)}
    folders = sorted(entry for entry in (path / "trials").glob("*") if entry.is_dir())
    folders.sort(key=lambda folder: places.get(folder.name, len(places)))
    for folder in folders[:MOST_TRIALS]:
        try:
            directory = RunDirectory.read(folder)
        except UserError as error:
            missing.append(f"trial {folder.name}: {_first(error, folder)}")
            continue
        name = f"{label}: {names.get(folder.name, folder.name)}"
        found.runs.append(_run(directory, name, with_layers=False))
    if len(folders) > MOST_TRIALS:
        missing.append(
            f"the curves of {len(folders) - MOST_TRIALS} of its {len(folders)} trials are left out"
        )
    found.sweeps.append(
        Sweep(
            label=label,
            kind=str(result.get("kind", "sweep")),
            recommended=recommended,
            rows=tuple(_objects(rows)),
            missing=tuple(missing),
        )
    )


def _ordered(trials: list[dict[str, Any]], setting: Any) -> list[dict[str, Any]]:
    """In their order, but those with the recommended setting first: not all may be shown."""

    def is_other(trial: dict[str, Any]) -> bool:
        settings = trial.get("settings")
        return not (isinstance(settings, list) and setting in settings)

    return sorted(trials, key=is_other)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _first(error: OSError | UserError, path: Path) -> str:
    what = error.problems[0].what if isinstance(error, UserError) else str(error.strerror)
    return what.removeprefix(f"{path}: ")
