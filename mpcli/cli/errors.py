"""What happens when a command cannot go on: one voice on stderr, or one JSON object on stdout."""

from __future__ import annotations

import errno
import functools
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec

import typer

from mpcli.cli.console import write
from mpcli.recipe.errors import Exit, Problem, UserError, did_you_mean, user_error

_Arguments = ParamSpec("_Arguments")
_UsageError: Any = typer.BadParameter.__mro__[1]  # typer exports only its subclass


def interruptible(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Report Ctrl-C as any other end of a command, where typer would exit in silence."""

    @functools.wraps(command)
    def call(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            raise user_error("interrupted", exit_code=Exit.INTERRUPTED) from None

    return call


def guarded(
    command: Callable[[], int | None], *, as_json: bool, usage: str = "mptrain --help"
) -> int:
    """Run `command` and return its exit code; whatever it raises is reported, not propagated.

    Args:
        as_json: failures are one JSON object on stdout too.
        usage: the command that shows how this one is used.
    """
    try:
        return command() or Exit.DONE
    except UserError as error:
        return fail(error.problems, error.exit_code, as_json=as_json)
    except _UsageError as error:
        return fail([_usage_problem(error, usage)], Exit.USAGE, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return fail([Problem("interrupted")], Exit.INTERRUPTED, as_json=as_json)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            problem = Problem(f"{error.filename}: file name too long")
            return fail([problem], Exit.USAGE, as_json=as_json)
        traceback.print_exc()
        problem = Problem(
            f"{type(error).__name__}: {error}",
            "this is a bug in mptrain; report it with the traceback and `mptrain env`",
        )
        return fail([problem], Exit.BUG, as_json=as_json)


_STATUS = {Exit.INTERRUPTED: "interrupted", Exit.PREEMPTED: "preempted"}


def fail(problems: Iterable[Problem], exit_code: Exit, *, as_json: bool) -> int:
    """Report why a command fails, and return its exit code."""
    show_problems(problems)
    if as_json:
        status = _STATUS.get(exit_code, "failed")
        write_json({"status": status, "exit_code": exit_code, "problems": as_records(problems)})
    return exit_code


def show_problems(problems: Iterable[Problem]) -> None:
    """Render problems on stderr."""
    from mpcli.recipe.render import render_problem

    for problem in problems:
        write(render_problem(problem), sys.stderr)


def as_records(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Problems as they stand in JSON output."""
    from mpcli.recipe.render import problem_json

    return [problem_json(problem) for problem in problems]


def write_json(value: dict[str, Any]) -> None:
    """Print one object of strict JSON on stdout."""
    from mpcli.records import strict_json

    write(strict_json(value, indent=2))


_OPTION_HINTS = {
    ("schema", "--json"): "`mptrain schema` prints JSON as it is",
}


def _usage_problem(error: Any, usage: str) -> Problem:
    """A mistake on the command line, in the words of every other problem."""
    context = error.ctx
    hint = f"`{usage}` shows the usage"
    message = error.format_message().rstrip(".").replace("'", "`").replace("Value error, ", "")
    if option := getattr(error, "option_name", None):
        if type(error).__name__ == "NoSuchOption":
            return Problem(f"unknown option `{option}`", _option_hint(option, context))
    elif match := re.match(r"No such command `(.*?)`", message):
        return Problem(
            f"unknown command `{match[1]}`", did_you_mean(match[1], context.command.commands)
        )
    return Problem(message[:1].lower() + message[1:], hint)


def _option_hint(option: str, context: Any) -> str | None:
    for name in _with_option(option, context.command):
        path = f"{context.command_path} {name}"
        return f"it belongs after the command, such as `{path} RECIPE {option}`"
    return _OPTION_HINTS.get((context.info_name, option)) or did_you_mean(
        option, _options(context.command), cutoff=0.7
    )


def _with_option(option: str, group: Any) -> Iterator[str]:
    """Commands of a group, and of groups in it, that have the option."""
    for name, command in sorted(getattr(group, "commands", {}).items()):
        if option in _options(command):
            yield name
        yield from (f"{name} {inner}" for inner in _with_option(option, command))


def _options(command: Any) -> list[str]:
    return [name for p in command.params for name in p.opts if name.startswith("--")]
