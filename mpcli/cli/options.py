"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcli.recipe.errors import user_error

RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        default_factory=list,
        show_default=False,
        help="Change a value of the recipe, such as `train.epochs=3`. Repeatable.",
    ),
]
PluginPath = Annotated[
    str | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="The Python file with the task of `task: {kind: plugin}`. It is run.",
        show_default=False,
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Treat warnings as errors (exit 2).")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, also on failure.")
]


def named_or_newest(path: str | None) -> Path:
    """The place that is named, or the newest run where none is.

    Raises:
        UserError: exit 2, the path is empty, or there are no runs.
    """
    from mpcli.rundir import newest_run

    if path == "":
        raise user_error("the path is empty", "leave it out for the newest run")
    return newest_run() if path is None else Path(path)
