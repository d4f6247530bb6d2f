"""`mptrain runs`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mpcli.cli.console import write
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson
from mpcli.recipe.errors import did_you_mean, user_error
from mpcli.recipe.render import visible

if TYPE_CHECKING:
    from mpcli.states import Overview

Order = Literal["state", "name", "metric", "time", "size", "started"]


def runs(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Where to look, at any depth.")
    ] = "runs",
    sort: Annotated[
        Order,
        typer.Option(
            metavar="COLUMN",
            help="state, name, metric (the best first), time or size (the most first), or started "
            "(the newest first).",
        ),
    ] = "started",
    state: Annotated[
        str | None,
        typer.Option(
            metavar="STATE,...",
            help="Only runs of these states: running, done, diverged, failed, killed, preempted, "
            "interrupted, recorded, unreadable.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs: state, metric, time and size of each."""
    from mpcli.rundir import find_runs
    from mpcli.states import overview

    place = Path(folder)
    _check_folder(place)
    wanted = _states(state)
    found = [overview(path) for path in find_runs(place)]
    shown = sorted(
        (run for run in found if wanted is None or run.state in wanted), key=_ORDERS[sort]
    )
    if as_json:
        about = {"folder": folder, "runs": [_as_json(run) for run in shown]}
        write_json({"status": "done", "exit_code": 0, **about})
        return
    if not shown:
        others = f", but {len(found):,} others" if found else ""
        of_them = f" that are {' or '.join(wanted)}" if wanted else ""
        write(visible(f"{folder}: no runs{of_them}{others}"), sys.stderr)
        return
    _show(folder, shown)


def _check_folder(place: Path) -> None:
    if not place.is_dir():
        found = "is a file" if place.exists() else "no such folder"
        hint = "name the folder that the runs are in; `mptrain run` makes one in `runs`"
        raise user_error(f"{place}: {found}", hint)


def _states(text: str | None) -> list[str] | None:
    from mpcli.states import STATES

    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STATES:
            raise user_error(f"--state {name}: no run is ever that", did_you_mean(name, STATES))
    return names


def _state_order(run: Overview) -> int:
    from mpcli.states import STATES

    return STATES.index(run.state)


def _most_first(value: float | None) -> tuple[bool, float]:
    return value is None, -(value or 0.0)


_ORDERS: dict[str, Callable[[Overview], Any]] = {
    "state": lambda run: (_state_order(run), str(run.path)),
    "name": lambda run: str(run.path),
    "metric": lambda run: (*(run.metric.rank if run.metric else (99, 0.0)), str(run.path)),
    "time": lambda run: (_most_first(run.wall_seconds), str(run.path)),
    "size": lambda run: (-run.size_bytes, str(run.path)),
    "started": lambda run: (_most_first(run.started), str(run.path)),
}


def _show(folder: str, shown: list[Overview]) -> None:
    from mpcli.cli.listing import run_metric_text, show_listing, size_text, steps_text, time_text

    number = f"{len(shown):,} runs" if len(shown) > 1 else "1 run"
    show_listing(
        f"{number} in {folder}",
        ("run", "state", "mode", "steps", "metric", "time", "size"),
        [
            (
                str(run.path), run.state, run.mode or "", steps_text(run), run_metric_text(run),
                time_text(run), size_text(run),
            )
            for run in shown
        ],
    )  # fmt: skip
    for run in shown:
        if run.state == "unreadable" and run.why:
            write(visible(f"{run.path}: {run.why}"), sys.stderr)


def _as_json(run: Overview) -> dict[str, Any]:
    return asdict(run) | {"path": str(run.path), "started": _time_text(run.started)}


def _time_text(seconds: float | None) -> str | None:
    """In UTC; None also for a file's date that no calendar has."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return None
