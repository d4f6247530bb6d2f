"""`mptrain compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpcli.cli.console import write
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson
from mpcli.recipe.errors import user_error
from mpcli.recipe.render import visible
from mpcli.signals import uninterrupted

if TYPE_CHECKING:
    from mpcli.comparison.sides import ComparedRun


def compare(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Two run directories or more. Those whose recipes differ in `train.seed` alone "
            "form a group.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Say where runs differ, and whether that is more than seed noise."""
    with uninterrupted():
        from mpcli.cli.compared import as_object, show
        from mpcli.comparison.compare import compare as compare_runs

    compared = compare_runs(_read(paths))
    if as_json:
        write_json({"status": "done", "exit_code": 0, **as_object(compared)})
    else:
        show(compared)


def _read(paths: list[str]) -> list[ComparedRun]:
    """Each run once, whatever names it has."""
    from mpcli.comparison.sides import read_run
    from mpcli.rundir import RunDirectory

    places: dict[Path, Path] = {}
    for path in map(Path, paths):
        known = places.setdefault(path.resolve(), path)
        if known is not path:
            how = "named twice" if path == known else str(known)
            write(visible(f"{path} is {how}: it counts once"), sys.stderr)
    if len(places) < 2:
        raise user_error("a comparison needs two runs", "name another one: `mptrain runs`")
    runs = [read_run(path) for path in places.values()]
    for run in runs:
        if run.about.state == "unreadable":
            write(visible(f"{run.path}: {run.about.why}"), sys.stderr)
        elif run.findings is None and (kept := RunDirectory(run.path).diagnosis_path).exists():
            write(visible(f"{kept}: no findings can be read from it"), sys.stderr)
    return runs
