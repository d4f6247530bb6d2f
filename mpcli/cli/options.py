"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

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
