"""What goes wrong through no fault of the program: one type, worded where it is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Literal


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    BUG = 1
    USAGE = 2  # recipe or command line
    ENVIRONMENT = 3  # missing extra, no such device, no data
    CHECKPOINT = 4
    NUMERICS = 5
    DISTRIBUTED = 6
    STORAGE = 7
    PREEMPTED = 75
    INTERRUPTED = 130


@dataclass(frozen=True)
class Place:
    """A range of one source line. Lines and columns count from 1, in characters.

    Line 0 is the file as a whole (a folder, a file that is missing or too large).
    """

    file: str
    line: int
    column: int
    length: int = 1
    text: str = ""  # the whole source line

    @property
    def start(self) -> tuple[str, int, int]:
        """File, line and column."""
        return self.file, self.line, self.column


@dataclass(frozen=True)
class Problem:
    """One thing to say to the user: where, what, and what helps."""

    what: str
    hint: str | None = None
    path: str = ""  # dotted path of the recipe value, "" where there is none
    place: Place | None = None
    severity: Literal["error", "warning"] = "error"
    finding: str | None = None  # id of the diagnose finding a warning will become
    exit_code: Exit = Exit.USAGE

    def at(self, place: Place | None) -> Problem:
        """The same problem with a place, unless it has one."""
        return self if self.place or place is None else replace(self, place=place)


@dataclass
class UserError(Exception):
    """One or more problems that end the command; never a traceback."""

    problems: tuple[Problem, ...]
    exit_code: Exit = field(init=False)

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(f"{p.path}: {p.what}" if p.path else p.what for p in problems))
        self.problems = problems
        errors = [p.exit_code for p in problems if p.severity == "error"] or [Exit.USAGE]
        # A recipe mistake is the first thing to mend: it outranks what the machine lacks.
        self.exit_code = Exit.USAGE if Exit.USAGE in errors else errors[0]

    def __reduce__(self) -> tuple[type[UserError], tuple[Problem, ...]]:
        """What another process makes it again from."""
        return type(self), self.problems


def user_error(
    what: str, hint: str | None = None, *, path: str = "", exit_code: Exit = Exit.USAGE
) -> UserError:
    """A `UserError` of a single problem without a place."""
    return UserError(Problem(what, hint, path=path, exit_code=exit_code))


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word most like `word` in any spelling of case, `-` and `_`, if one is close."""
    spelt = {_plain(name): name for name in sorted(known)}
    close = difflib.get_close_matches(_plain(word[:100]), spelt, n=1, cutoff=cutoff)
    return spelt[close[0]] if close else None


def _plain(word: str) -> str:
    return word.casefold().replace("_", "-")


def one_of(names: Iterable[str]) -> str:
    """`` `a`, `b` or `c` ``."""
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} or {last}" if first else last


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """A hint that names the closest known word, or all of them when none is close."""
    known = sorted(known)
    close = closest(word, known, cutoff)
    if close:
        return f"did you mean `{close}`?"
    return f"known: {', '.join(f'`{name}`' for name in known)}" if known else None
