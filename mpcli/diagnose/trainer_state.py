"""`trainer_state.json` of a Hugging Face Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpcli.diagnose.facts import LoggedRow, TrainerFacts
from mpcli.diagnose.reading import unreadable

LAST = 10


def trainer_facts(path: Path, state: Mapping[str, Any]) -> TrainerFacts:
    """The newest entries of its log, and the first that is not finite.

    Args:
        path: of the file, for messages.
        state: what is in it.

    Raises:
        UserError: exit 4, it does not say what a Trainer says.
    """
    try:
        rows = [_row(entry) for entry in state.get("log_history", []) if "loss" in entry]
        return TrainerFacts(
            global_step=state["global_step"],
            max_steps=state.get("max_steps"),
            epoch=state.get("epoch"),
            last=tuple(rows[-LAST:]),
            first_nonfinite=next((row for row in rows if not _is_finite(row)), None),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(path, "it is not what a Trainer writes") from error


def _row(entry: Mapping[str, Any]) -> LoggedRow:
    return LoggedRow(
        step=entry["step"],
        loss=entry["loss"],
        grad_norm=entry.get("grad_norm"),
        learning_rate=entry.get("learning_rate"),
    )


def _is_finite(row: LoggedRow) -> bool:
    return math.isfinite(row.loss) and math.isfinite(row.grad_norm or 0.0)
