"""The evidence in a run directory: its rows are read one at a time, however many there are."""

from __future__ import annotations

import math
from collections import Counter, deque
from itertools import islice

from mpcli import checkpoint
from mpcli.diagnose.contents import checkpoint_facts, folder_facts
from mpcli.diagnose.facts import Facts, NotRead, RunFacts
from mpcli.flight import flights
from mpcli.recipe.errors import UserError
from mpcli.records import LayerRecord, StepRecord
from mpcli.rundir import RunDirectory

LAST = 10
EVENTS = 100
"""Rows of events: more say that something new happens in every step."""


def run_facts(run: RunDirectory) -> Facts:
    """What a run recorded, and the static part of its newest checkpoint that is whole.

    Where no checkpoint is, that of the trained model in `final`.

    Raises:
        UserError: exit 4 where there are weights and none can be read.
    """
    found = {"path": str(run.path), "kind": "run", "run": _recorded(run)}
    weights, not_read = _weights(run)
    if weights:
        found |= {"weights_from": weights.path, "not_read": (*not_read, *weights.not_read)}
        return weights.model_copy(update=found)
    return Facts.model_validate(found)


def _recorded(run: RunDirectory) -> RunFacts:
    last: deque[StepRecord] = deque(maxlen=LAST)
    steps = skipped = nonfinite = 0
    first_nonfinite = None
    unread: Counter[str] = Counter()
    for row in run.steps(unread):
        last.append(row)
        steps += 1
        skipped += not row.applied
        if not math.isfinite(row.loss):
            nonfinite += 1
            first_nonfinite = first_nonfinite or row
    return RunFacts(
        foreign=run.foreign(),
        result=run.result(),
        steps=steps,
        skipped=skipped,
        nonfinite_losses=nonfinite,
        first_nonfinite=first_nonfinite,
        last=tuple(last),
        sampled=tuple(_newest_sample(run, unread)),
        flights=tuple(flights(run)),
        events=tuple(islice(run.events(unread), EVENTS)),
        types=run.observed(),
        unread=dict(unread),
    )


def _newest_sample(run: RunDirectory, unread: Counter[str]) -> list[LayerRecord]:
    """Rows of the last sampled step."""
    rows: list[LayerRecord] = []
    for row in run.layers(unread):
        if rows and (row.step, row.attempt) != (rows[0].step, rows[0].attempt):
            rows.clear()
        rows.append(row)
    return rows


def _weights(run: RunDirectory) -> tuple[Facts | None, list[NotRead]]:
    """Those of the first place that can be read, and the places before it."""
    not_read: list[NotRead] = []
    error: UserError | None = None
    for found in checkpoint.completed(run.checkpoints_path):
        try:
            return checkpoint_facts(found), not_read
        except UserError as damage:
            error = error or damage
            not_read.append(NotRead(file=f"checkpoints/{found.path.name}", why=str(damage)))
    if run.final_path.is_dir():
        return folder_facts(run.final_path), not_read
    if error:
        raise error
    return None, []
