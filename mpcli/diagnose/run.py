"""The evidence in a run directory. Rows are read once, one at a time, however many there are."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections import Counter, deque
from itertools import groupby, islice

import numpy as np

from mpcli import checkpoint
from mpcli.diagnose.contents import checkpoint_facts, folder_facts
from mpcli.diagnose.evidence import Evidence, History, Sample
from mpcli.diagnose.facts import Facts, NotRead, RunFacts
from mpcli.flight import flights
from mpcli.recipe.errors import UserError
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan, StepRecord
from mpcli.rundir import RunDirectory

LAST = 10
EVENTS = 100
"""Rows of events: more say that something new happens in every step."""


def run_evidence(run: RunDirectory, recipe: Recipe | None) -> Evidence:
    """What a run recorded, and the static part of its newest checkpoint that is whole.

    Where no checkpoint is, that of the trained model in `final`.

    Args:
        recipe: of the run; None of one that is not ours, or that a plug-in made which is not here.
    """
    unread: Counter[str] = Counter()
    history, last, first_nonfinite = _history(run, unread)
    rows = groupby(run.layers(unread), key=lambda row: (row.attempt, row.step))
    samples = tuple(Sample(step, tuple(found)) for (_, step), found in rows)
    events = tuple(islice(run.events(unread), EVENTS))
    recorded = RunFacts(
        foreign=run.foreign(),
        result=run.result(),
        steps=len(history),
        skipped=int(history.skipped.sum()),
        nonfinite_losses=int((~history.finite_loss).sum()),
        first_nonfinite=first_nonfinite,
        last=last,
        sampled=samples[-1].rows if samples else (),
        flights=tuple(flights(run)),
        events=events,
        types=run.observed(),
        unread=dict(unread),
    )
    weights, not_read = _weights(run)
    found = {"path": str(run.path), "kind": "run", "run": recorded, "not_read": tuple(not_read)}
    if weights:
        found |= {"weights_from": weights.path, "not_read": (*not_read, *weights.not_read)}
        facts = weights.model_copy(update=found)
    else:
        facts = Facts.model_validate(found)
    return Evidence(
        facts=facts,
        recipe=recipe,
        plan=_plan(run),
        history=history,
        samples=samples,
        evaluations=tuple(run.evaluations()),
        events=events,
    )


def _history(
    run: RunDirectory, unread: Counter[str]
) -> tuple[History, tuple[StepRecord, ...], StepRecord | None]:
    """All rows of steps as columns, the last ones, and the first whose loss is not finite."""
    steps, applied = array("q"), array("b")
    numbers = {name: array("d") for name in ("loss", "lr", "grad_norm", "scale")}
    last: deque[StepRecord] = deque(maxlen=LAST)
    first_nonfinite = None
    for row in run.steps(unread):
        steps.append(row.step)
        applied.append(row.applied)
        for name, column in numbers.items():
            column.append(getattr(row, name))
        last.append(row)
        if first_nonfinite is None and not math.isfinite(row.loss):
            first_nonfinite = row
    columns = {name: np.array(column, np.float64) for name, column in numbers.items()}
    history = History(
        step=np.array(steps, np.int64), applied=np.array(applied, np.bool_), **columns
    )
    return history, tuple(last), first_nonfinite


def _plan(run: RunDirectory) -> Plan | None:
    try:
        return run.plan()
    except (OSError, ValueError):
        return None


def _weights(run: RunDirectory) -> tuple[Facts | None, list[NotRead]]:
    """Those of the first place that can be read, and the places before it."""
    not_read: list[NotRead] = []
    for found in checkpoint.completed(run.checkpoints_path):
        try:
            return _with_finite(run, checkpoint_facts(found), found.step), not_read
        except UserError as damage:
            not_read.append(NotRead(file=f"checkpoints/{found.path.name}", why=str(damage)))
    if run.final_path.is_dir():
        try:
            return folder_facts(run.final_path), not_read
        except UserError as damage:
            not_read.append(NotRead(file="final", why=str(damage)))
    return None, not_read


def _with_finite(run: RunDirectory, newest: Facts, step: int) -> Facts:
    """Where weights are not finite, the older ones are searched for some that are."""
    if newest.weights is None or not newest.weights.nonfinite_layers:
        return newest
    for older in checkpoint.completed(run.checkpoints_path):
        if older.step >= step:
            continue
        with contextlib.suppress(UserError):
            weights = checkpoint_facts(older).weights
            if weights and not weights.nonfinite_layers:
                return newest.model_copy(update={"finite_checkpoint": older.path.name})
    return newest
