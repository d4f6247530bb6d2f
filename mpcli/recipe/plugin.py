"""A task in a file of the user's own. Only the command line names it: no recipe, nothing on disk.

The file has the names that every task has (`mpcli.tasks.base`): `Options`, a subclass of `Plugin`,
and the functions `load_data`, `build_model`, `loss` and `evaluate`.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import ClassVar, Literal

from pydantic import ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError

from mpcli.recipe.base import Section
from mpcli.recipe.errors import Place, Problem, UserError
from mpcli.recipe.source import decoded

FUNCTIONS = {
    "load_data": ("options", "data"),
    "build_model": ("options", "info"),
    "loss": ("options", "model", "batch"),
    "evaluate": ("options", "model", "batches"),
}
"""What a plug-in defines, and with which arguments it is called."""

_MODULE = "mptrain_plugin"
_HINT = "`mptrain init plugin` writes an example"


@dataclass(frozen=True)
class PluginFile:
    """A plug-in that was run as a module."""

    file: str  # as the user typed it
    content: bytes
    sha256: str
    module: ModuleType

    def place(self, line: int, column: int = 0, end: int | None = None) -> Place:
        """A place in the file.

        Args:
            line: from 1.
            column: of the first byte, from 0.
            end: after the last byte.
        """
        lines = self.content.removeprefix(codecs.BOM_UTF8).splitlines()
        text = lines[line - 1] if line <= len(lines) else b""
        before = text[:column].decode(errors="replace")
        marked = text[column:end].decode(errors="replace").rstrip()
        shown = text.decode(errors="replace")
        return Place(self.file, line, len(before) + 1, max(1, len(marked)), shown)

    def error(self, function: str, what: str, hint: str | None = _HINT) -> UserError:
        """A `UserError` about one of the file's functions."""
        return UserError(Problem(f"`{function}` {what}", hint, place=self.defined(function)))

    def defined(self, function: str) -> Place:
        """Where a function begins: its own lines, not a decorator's or another file's."""
        code = getattr(inspect.unwrap(getattr(self.module, function)), "__code__", None)
        if code is None or code.co_filename != self.file:
            return Place(self.file, 0, 0)
        return self.place(code.co_firstlineno)

    def field(self, name: str) -> Place:
        """Where `Options` declares a field; the whole file where it is declared elsewhere."""
        for statement in ast.parse(decoded(self.content, self.file)).body:
            if isinstance(statement, ast.ClassDef) and statement.name == "Options":
                for field in statement.body:
                    if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == name:
                        return self.place(field.lineno, field.col_offset)
        return Place(self.file, 0, 0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around its code, whose prints are no output of a command and which ends no process.

        Raises:
            UserError: it calls `sys.exit`.
        """
        try:
            with redirect_stdout(sys.stderr):
                yield
        except SystemExit as error:
            raise blamed(error, self) or error from error


class Plugin(Section):
    """The task of the file that `--plugin` names; its fields are what the file's `Options` declare.

    Attributes:
        plugin: the file that a subclass is from.
    """

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})
    plugin: ClassVar[PluginFile]

    kind: Literal["plugin"]


def load_plugin(path: str, sha256: str | None = None) -> PluginFile:
    """Run a file as a module.

    Args:
        path: as the user typed it.
        sha256: that the file has to have; another one is not run.

    Raises:
        UserError: the file cannot be read or run, is another, or is no task.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(Problem(f"cannot be read: {reason}", place=Place(path, 0, 0))) from error
    digest = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, digest):
        what = f"its SHA-256 is {digest}, and the run's plug-in has {sha256}"
        hint = "`plugin.py` in the run directory is the run's: name it, or begin a new run"
        raise UserError(Problem(what, hint, place=Place(path, 0, 0)))
    plugin = PluginFile(path, content, digest, ModuleType(_MODULE))
    _execute(plugin)
    _check_names(plugin)
    plugin.module.Options.plugin = plugin
    return plugin


def plugin_error(error: BaseException, task: Section, hint: str | None = None) -> UserError | None:
    """What an exception that passed through the code of a plug-in is: a mistake in it."""
    return blamed(error, task.plugin, hint) if isinstance(task, Plugin) else None


def _execute(plugin: PluginFile) -> None:
    plugin.module.__file__ = plugin.file
    sys.modules[_MODULE] = plugin.module  # where pydantic and dataclasses look up annotations
    code = _compiled(plugin)
    try:
        with plugin.running():
            exec(code, plugin.module.__dict__)
    except UserError:
        raise
    except Exception as error:
        raise blamed(error, plugin) or error from error


def _compiled(plugin: PluginFile) -> CodeType:
    text = decoded(plugin.content, plugin.file)
    if "\0" in text:  # of which Python does not say where it is
        line = plugin.content[: plugin.content.index(b"\0")].count(b"\n") + 1
        raise UserError(Problem("not Python: a NUL character", place=plugin.place(line)))
    try:
        return compile(text, plugin.file, "exec")
    except SyntaxError as error:
        column = (error.offset or 1) - 1
        place = Place(plugin.file, error.lineno or 1, column + 1, 1, (error.text or "").rstrip())
        raise UserError(Problem(f"not Python: {error.msg}", place=place)) from error
    except (RecursionError, MemoryError) as error:  # what is nested too deep
        what = f"not Python: {str(error) or 'nested too deep'}"
        raise UserError(Problem(what, place=Place(plugin.file, 0, 0))) from error


def _check_names(plugin: PluginFile) -> None:
    problems = []
    whole = Place(plugin.file, 0, 0)
    options = getattr(plugin.module, "Options", None)
    if not (isinstance(options, type) and issubclass(options, Plugin)):
        what = "no class `Options(Plugin)`: the fields of the recipe's `task`"
        problems.append(Problem(what, _HINT, place=whole))
    else:
        problems += _options_problems(options, plugin)
    for name, arguments in FUNCTIONS.items():
        function = getattr(plugin.module, name, None)
        shown = f"{name}({', '.join(arguments)})"
        if not inspect.isfunction(function):
            problems.append(Problem(f"no function `{shown}`", _HINT, place=whole))
            continue
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError as error:
            what = f"is called as `{shown}`: {error}"
            problems.append(Problem(what, _HINT, place=plugin.defined(name)))
    if problems:
        raise UserError(*problems)


def _options_problems(options: type[Plugin], plugin: PluginFile) -> Iterator[Problem]:
    """Names that a plug-in's fields may not have, and defaults that are no values of theirs."""
    fields, known = options.model_fields, Plugin.model_fields
    if taken := [
        name
        for name in ("plugin", "kind")
        if name in fields
        and (name not in known or fields[name].annotation != known[name].annotation)
    ]:
        what, hint = f"`Options` has a `{taken[0]}` of its own", "give the field another name"
        yield Problem(what, hint, place=plugin.field(taken[0]))
        return
    try:
        with plugin.running():
            _with_checked_defaults(options).model_validate({"kind": "plugin"})
    except ValidationError as error:
        for details in error.errors(include_url=False):
            name = str(details["loc"][0]) if details["loc"] else ""
            required = name not in fields or fields[name].is_required()
            if not required and details["type"] != "default_factory_not_called":
                what = f"the default of `{name}`: {_lower(details['msg'])}"
                yield Problem(what, place=plugin.field(name))
    except UserError:
        raise
    except Exception as error:  # such as an annotation that says nothing
        what, *_ = str(error).strip().splitlines() or [type(error).__name__]
        whole = UserError(Problem(what, place=Place(plugin.file, 0, 0)))
        raise blamed(error, plugin) or whole from error


def _with_checked_defaults(options: type[Plugin]) -> type[Plugin]:
    # Not for good: what is validated as JSON would have its defaults validated as JSON too.
    class Options(options):  # type: ignore[misc, valid-type]
        model_config = ConfigDict(validate_default=True)

    return Options


def lasting(options: Plugin) -> list[Problem]:
    """What keeps a plug-in's options from being read back from the run directory's recipe."""
    plugin, name = options.plugin, ""
    try:
        with plugin.running():
            again = type(options).model_validate_json(options.model_dump_json(warnings="none"))
    except PydanticSerializationError as error:
        what = f"options that no recipe can hold: {_lower(str(error))}"
    except ValidationError as error:
        first, *_ = error.errors(include_url=False)
        name = str(first["loc"][0]) if first["loc"] else ""
        what = f"`{name}` cannot be read back from a recipe: {_lower(first['msg'])}"
    else:
        if again == options:
            return []
        values, others = dict(options), dict(again)
        name = next((name for name in values if values[name] != others[name]), "")
        what = f"`{name}` is another value when it is read back from a recipe"
    hint = "recipes hold text, numbers, `true`, `false`, `null`, and lists and sections of them"
    return [Problem(what, hint, place=plugin.field(name))]


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def blamed(error: BaseException, plugin: PluginFile, hint: str | None = None) -> UserError | None:
    """What an exception that passed through the code of a plug-in is: a mistake there."""
    place = _last_place(error.__traceback__, plugin)
    if place is None:
        return None
    lines = str(error).strip().splitlines()
    what = ": ".join((type(error).__name__, *lines[:1]))
    if isinstance(error, ModuleNotFoundError) and error.name:
        beside = Path(plugin.file).parent / error.name.partition(".")[0]
        if beside.is_dir() or beside.with_suffix(".py").is_file():
            hint = "a plug-in is one file, of which a run keeps a copy: move the code into it"
    return UserError(Problem(what, hint, place=place))


def _last_place(traceback: TracebackType | None, plugin: PluginFile) -> Place | None:
    """The innermost place in the file."""
    place = None
    while traceback:
        code = traceback.tb_frame.f_code
        if code.co_filename == plugin.file:
            line, last_line, column, end = list(code.co_positions())[traceback.tb_lasti // 2]
            line = line or traceback.tb_lineno
            place = plugin.place(line, column or 0, end if last_line == line else None)
        traceback = traceback.tb_next
    return place
