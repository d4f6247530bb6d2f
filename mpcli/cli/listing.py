"""Runs as a table: paths are whole, to be copied, and the facts stand below each other."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mpcli.cli.console import clock_text, memory_text, write
from mpcli.sizes import metric_text

if TYPE_CHECKING:
    from mpcli.states import Overview

_GAP = "  "
_NARROWEST = 24  # cells of a column of paths
_NUMBERS = {"steps", "time", "size", "skipped"}
_STYLES = {
    "running": "cyan", "done": "green", "diverged": "red", "failed": "red", "killed": "red",
    "unreadable": "red", "preempted": "yellow", "interrupted": "yellow",
}  # fmt: skip


def show_listing(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout; a first cell that is too long stands in a line of its own.

    Args:
        header: numbers of a column that is called so stand to the right.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    from mpcli.recipe.render import visible

    rows = [tuple(map(visible, row)) for row in rows]
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else 10_000
    firsts, *columns = zip(header, *rows, strict=True)
    widths = [max(map(cell_len, column)) for column in columns]
    room = width - sum(widths) - len(_GAP) * len(widths)
    if room < _NARROWEST:
        room = 0
    indent = max((cell_len(cell) for cell in firsts[1:] if cell_len(cell) <= room), default=0)

    def facts(row: Sequence[str], style: str = "") -> Text:
        line = Text()
        for name, cell, room in zip(header[1:], row[1:], widths, strict=True):
            blanks = " " * (room - cell_len(cell))
            line.append(_GAP)
            line.append(
                blanks + cell if name in _NUMBERS else cell + blanks, style or _STYLES.get(cell)
            )
        return line

    lines = [Text(title, "bold")]
    for number, row in enumerate([header, *rows]):
        style, first = "" if number else "dim", row[0]
        if cell_len(first) > indent:
            lines += [Text(first, style)] if number else []
            first = ""
        blanks = " " * (indent - cell_len(first))
        lines.append(Text(first + blanks, style) + facts(row, style))
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=on_terminal, highlight=False)
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)
    write(text.getvalue())


def steps_text(run: Overview) -> str:
    """`420/1,000`, or `1,000` where that is all."""
    if run.steps is None:
        return ""
    steps = _count_text(run.steps)
    if run.planned_steps is None or run.planned_steps == run.steps:
        return steps
    return f"{steps}/{_count_text(run.planned_steps)}"


def run_metric_text(run: Overview) -> str:
    """`accuracy 94.51%`, `train loss 0.1234`."""
    if run.metric is None:
        return ""
    split = "train " if run.metric.split == "train" else ""
    return f"{split}{run.metric.name} {metric_text(run.metric.name, run.metric.value)}"


def time_text(run: Overview) -> str:
    """That the run took."""
    return "" if run.wall_seconds is None else clock_text(run.wall_seconds)


def size_text(run: Overview) -> str:
    """Of its files."""
    return memory_text(run.size_bytes)


def _count_text(count: int) -> str:
    return f"{count:,}" if abs(count) < 10**12 else "very many"
