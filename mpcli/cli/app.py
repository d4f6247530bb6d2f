"""`mptrain`: the list of commands and the entry point."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from mpcli import __version__
from mpcli.cli import (
    check,
    compare,
    diagnose,
    env,
    eval,
    init,
    plan,
    report,
    run,
    runs,
    schema,
    sweep,
    watch,
)
from mpcli.cli.console import prepare_streams, write
from mpcli.cli.errors import guarded, interruptible

COMMANDS = (
    run.run, check.check, plan.plan, eval.eval, diagnose.diagnose, report.report, runs.runs,
    watch.watch, compare.compare, init.init, schema.schema, env.env,
)  # fmt: skip


def _print_help(text: str) -> NoReturn:
    write(text)  # typer's own printing has no answer to a full disk
    raise typer.Exit


class _Command(TyperCommand):
    def get_help(self, ctx: Any) -> str:
        _print_help(super().get_help(ctx))


class _Group(TyperGroup):
    def get_help(self, ctx: Any) -> str:
        _print_help(super().get_help(ctx))


app = typer.Typer(
    cls=_Group,
    help="Mixed-precision training that explains itself.",
    rich_markup_mode=None,  # boxes cost a third of the time that help takes
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(cls=_Command)(interruptible(command))
sweeps = typer.Typer(
    cls=_Group,
    help="Many short runs of a recipe, and what they show together.",
    rich_markup_mode=None,
)
for name, kind in sweep.COMMANDS.items():
    sweeps.command(name, cls=_Command)(interruptible(kind))
app.add_typer(sweeps, name="sweep")


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"mptrain {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _named(arguments: Sequence[str]) -> list[str]:
    """The command, as far as it is known."""
    if arguments[0] == "sweep":
        return ["sweep", *(name for name in arguments[1:2] if name in sweep.COMMANDS)]
    return [command.__name__ for command in COMMANDS if command.__name__ == arguments[0]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of `arguments` (default: the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    prepare_streams()
    if arguments == ["sweep"]:
        arguments.append("--help")
    named = _named(arguments)
    return guarded(
        lambda: app(arguments, prog_name="mptrain", standalone_mode=False),
        as_json="--json" in arguments,
        usage=" ".join(["mptrain", *named, "--help"]),
    )
