"""Problems as text with a caret, and as JSON."""

from __future__ import annotations

import unicodedata
from typing import Any

from mpcli.recipe.errors import Place, Problem

_WIDTH = 100  # of a shown source line, in terminal cells
_LONGEST = 400  # characters of a message: a field's name may be anything


def render_problem(problem: Problem) -> str:
    """The problem in a few lines: where and what, the source line with a caret, what helps."""
    lines = [": ".join(_shown(part) for part in _header(problem) if part)]
    if problem.place and problem.place.text:
        lines += _excerpt(problem.place)
    if problem.hint:
        lines.append(f"  help: {_shown(problem.hint)}")
    return "\n".join(lines)


def problem_json(problem: Problem) -> dict[str, Any]:
    """The problem as one element of `problems` in the output of `--json`."""
    place = problem.place
    return {
        "file": place.file if place else None,
        "line": place.line or None if place else None,
        "column": place.column or None if place else None,
        "path": problem.path or None,
        "message": problem.what,
        "hint": problem.hint,
        "severity": problem.severity,
        "finding": problem.finding,
    }


def visible(text: str) -> str:
    """`text` with escapes for characters that move the cursor or do not show."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _shown(text: str) -> str:
    return visible(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def _header(problem: Problem) -> list[str]:
    place, where = problem.place, "error"
    if place:
        where = f"{place.file}:{place.line}:{place.column}" if place.line else place.file
    if problem.severity == "warning":
        warning = f"warning[{problem.finding}]" if problem.finding else "warning"
        where = f"{where}: {warning}" if place else warning
    return [where, problem.path, problem.what]


def _excerpt(place: Place) -> list[str]:
    """The source line around the place, and carets under it."""
    from rich.cells import cell_len, set_cell_size  # not needed unless something is wrong

    start = place.column - 1
    # Escapes and wide characters only make text longer: no more characters than cells are shown.
    before = visible(place.text[max(0, start - _WIDTH) : start])
    marked = visible(place.text[start : start + place.length][:_WIDTH])
    after = visible(place.text[start + place.length :][:_WIDTH])
    if start > _WIDTH or cell_len(before) > _WIDTH * 2 // 3:
        while cell_len(before) > _WIDTH // 3:
            before = before[1:]
        before = f"…{before}"
    room = _WIDTH - cell_len(before)
    if cell_len(marked) > room:
        marked, after = set_cell_size(marked, room - 1).rstrip() + "…", ""
    elif cell_len(marked) + cell_len(after) > room:
        after = set_cell_size(after, room - cell_len(marked) - 1) + "…"
    carets = " " * cell_len(before) + "^" * max(1, cell_len(marked))
    return [f"{place.line:5} | {before}{marked}{after}".rstrip(), f"      | {carets}"]
