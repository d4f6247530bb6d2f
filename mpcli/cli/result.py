"""What `mptrain run` shows before and after the training."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from mpcli.cli.console import memory_text, show_table, write
from mpcli.cli.errors import show_problems, write_json
from mpcli.recipe.errors import Exit, Place, Problem
from mpcli.sizes import metric_text

if TYPE_CHECKING:
    from mpcli.recipe.load import LoadedRecipe
    from mpcli.records import Result, ResultProblem
    from mpcli.rundir import RunDirectory


def show_warnings(loaded: LoadedRecipe, warnings: list[Problem]) -> None:
    """What a person should know before the training begins."""
    show_problems(warnings)
    for message in loaded.dropped:
        write(message, sys.stderr)


def show_result(
    result: Result, directory: RunDirectory, loaded: LoadedRecipe, *, as_json: bool
) -> NoReturn:
    """Show how the run ended, and end with its exit code."""
    if as_json:
        write_json(result.model_dump(mode="python"))
    else:
        show_summary(result, directory.path)
    show_problems(
        Problem(
            p["message"],
            p["hint"],
            path=p["path"] or "",
            severity=p["severity"],
            finding=p["finding"],
        ).at(_place(p, loaded))
        for p in result.problems
    )
    if result.exit_code == Exit.NUMERICS:
        plugin = ["--plugin", loaded.plugin.file] if loaded.plugin else []
        write(
            f"find out why: {shlex.join(['mptrain', 'diagnose', str(directory.path), *plugin])}",
            sys.stderr,
        )
    raise typer.Exit(result.exit_code)


def _place(problem: ResultProblem, loaded: LoadedRecipe) -> Place | None:
    """Where a recorded problem is: in the plug-in, or in the recipe."""
    line, column = problem["line"], problem["column"]
    if loaded.plugin and line and column:
        return loaded.plugin.place(line, column - 1)
    if loaded.plugin and problem["file"]:
        return Place(loaded.plugin.file, 0, 0)
    return loaded.place(problem["path"] or "")


def show_summary(result: Result, path: Path) -> None:
    """Print how a run ended."""
    show_table("Result", ("", ""), _summary(result, path))


def _summary(result: Result, path: Path) -> list[tuple[str, str]]:
    metrics = {
        f"{split} {name}": metric_text(name, value)
        for split, values in result.metrics.items()
        for name, value in values.items()
    }
    return [
        ("status", result.status),
        *([("reason", result.reason)] if result.reason and not result.problems else []),
        ("steps", f"{result.steps_applied:,} applied, {result.steps_skipped:,} skipped"),
        *metrics.items(),
        ("time", f"{result.wall_seconds:.1f} s, {result.input_share:.1%} of it for input"),
        ("peak memory", memory_text(result.peak_memory_bytes or None)),
        ("run directory", str(path)),
    ]
