"""`mptrain run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpcli.cli.console import display, memory_text, show_table, write
from mpcli.cli.errors import show_problems, write_json
from mpcli.cli.options import AsJson, Overrides, RecipePath, Strict
from mpcli.cli.plan import make
from mpcli.recipe.errors import Problem, user_error

if TYPE_CHECKING:
    from mpcli.records import Result


def run(
    recipe: RecipePath,
    overrides: Overrides,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The run directory itself; default: runs/<name>/<UTC time>-<recipe hash>.",
            show_default=False,
        ),
    ] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe says; leave a run directory."""
    if output == "":
        raise user_error("`--output` names no folder", "leave it out, or name a new folder")
    loaded, planned, warnings = make(recipe, overrides, strict=strict)

    from mpcli.machine import environment, uninterrupted

    with uninterrupted():
        from mpcli.launch import launch
        from mpcli.rundir import RunDirectory

    show_problems(warnings)
    for message in loaded.dropped:
        write(message, sys.stderr)
    folder = None if output is None else Path(output)
    directory = RunDirectory.create(loaded, planned, environment(), folder)
    result = launch(directory, display())
    if as_json:
        write_json(result.model_dump(mode="python"))
    else:
        show_table("Result", ("", ""), _summary(result, directory.path))
    show_problems(
        Problem(
            p["message"],
            p["hint"],
            path=p["path"] or "",
            severity=p["severity"],
            finding=p["finding"],
        ).at(loaded.place(p["path"] or ""))
        for p in result.problems
    )
    raise typer.Exit(result.exit_code)


def _summary(result: Result, path: Path) -> list[tuple[str, str]]:
    metrics = {
        f"{split} {name}": f"{value:.2%}" if name == "accuracy" else f"{value:.4f}"
        for split, values in result.metrics.items()
        for name, value in values.items()
    }
    return [
        ("status", result.status),
        *([("reason", result.reason)] if result.reason and not result.problems else []),
        ("steps", f"{result.steps_applied:,} applied, {result.steps_skipped:,} skipped"),
        *metrics.items(),
        ("time", f"{result.wall_seconds:.1f} s"),
        ("peak memory", memory_text(result.peak_memory_bytes or None)),
        ("run directory", str(path)),
    ]
