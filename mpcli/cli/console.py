"""What the person sees: data on stdout, progress on stderr, whatever either of them is."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mpcli.recipe.errors import Exit, user_error
from mpcli.sizes import metric_text, size_text

if TYPE_CHECKING:
    from mpcli.recipe.recipe import Recipe
    from mpcli.records import EvalRecord, Plan, StepRecord
    from mpcli.trainer import Display


_NARROWEST = 24  # cells in which sentences are still readable


def prepare_streams() -> None:
    """Let no locale and no closed stream make printing fail, and no library's import print."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # transformers imports what there is: DeepSpeed tells stdout what device it found (the engine
    # that uses it lets it speak), torchao's types make torch warn.
    for library in ("DeepSpeed", "torch.utils._pytree"):
        logging.getLogger(library).disabled = True


def write(text: str, stream: TextIO | None = None) -> None:
    """Print a line (on stdout by default). A reader who left early, such as `head`, is no error."""
    printed(text, stream)


def printed(text: str, stream: TextIO | None = None) -> bool:
    """Print a line as `write` does, and say whether anybody reads it."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
        return True
    except OSError as error:
        _discard_rest(stream)
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise user_error(
                f"cannot write to stdout: {error.strerror}", exit_code=Exit.STORAGE
            ) from error
        return False


def _discard_rest(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout, or a line for each row where a terminal is too narrow for it.

    Nothing that a person may want to copy (a name, a path) is cut in two: only the last column
    has several lines, broken between words. A header may have two lines.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mpcli.recipe.render import visible

    rows = [tuple(map(visible, row)) for row in rows]  # names may come from a stranger
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else 10_000
    lines = max(name.count("\n") for name in header)
    names = ["\n" * (lines - name.count("\n")) + name for name in header]  # aligned below
    # The longer line of a header stands for it.
    longest = [max(name.split("\n"), key=cell_len) for name in header]
    *columns, last = zip(longest, *rows, strict=True)
    room = width - sum(max(map(cell_len, column)) + 2 for column in columns)
    words = [word for cell in last for word in cell.split()]
    wanted = min(max(map(cell_len, last)), _NARROWEST)
    if room < max([wanted, *map(cell_len, words)]):
        write("\n".join([title, *(_line(header, row) for row in rows), ""]))
        return
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
        show_header=any(header), header_style="dim",
    )  # fmt: skip
    for name in names[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(names[-1])
    for row in rows:
        table.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=on_terminal).print(table)
    write("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _line(header: Sequence[str], row: Sequence[str]) -> str:
    """`first: second, name of the third column and third`."""
    facts = (
        f"{' '.join(name.split())} {cell}".strip()
        for name, cell in zip(header[1:], row[1:], strict=True)
        if cell
    )
    return f"{row[0]}: {', '.join(facts)}"


def memory_text(num_bytes: int | None) -> str:
    """Bytes for people, if they are known."""
    return "unknown" if num_bytes is None else size_text(num_bytes)


def display() -> Display:
    """A progress bar on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return BarDisplay()
    return LineDisplay()


class _Facts:
    """What both displays tell of a run."""

    def __init__(self, plan: Plan, recipe: Recipe) -> None:
        self.steps = plan.steps
        self.skipped = 0
        self.before: int | None = None  # steps of earlier attempts
        self.started = time.monotonic()
        self.heading = (
            f"{recipe.name}: {recipe.precision.mode} on {plan.device}, "
            f"{plan.parameters:,} parameters, {plan.num_train:,} samples, "
            f"{plan.steps:,} steps of {recipe.train.global_batch_size:,}"
        )

    def of(self, rows: Sequence[StepRecord], room: int | None = None) -> str:
        """What is so after the newest of `rows`, by worth: as much as `room` cells hold."""
        last = rows[-1]
        self.skipped += sum(not row.applied for row in rows)
        if self.before is None:
            self.before = rows[0].step - 1
        seconds = (time.monotonic() - self.started) / (last.step - self.before)
        left = seconds * (self.steps - last.step)
        facts = [
            f"step {last.step}/{self.steps}",
            f"loss {last.loss:.4f}",
            f"scale {last.scale:g}",
            f"skipped {self.skipped}",
            f"{clock_text(left)} left",
            f"{last.samples_per_second:,.0f} samples/s",
        ]
        while room is not None and len(facts) > 1 and len("  ".join(facts)) > room:
            facts.pop()
        return "  ".join(facts)


def evaluation_text(row: EvalRecord) -> str:
    """A line on an evaluation."""
    metrics = ", ".join(f"{name} {metric_text(name, v)}" for name, v in row.metrics.items())
    average = " with averaged weights" if row.ema else ""
    return f"step {row.step}: eval {metrics}{average} ({row.seconds:.1f} s)"


def clock_text(seconds: float) -> str:
    """A time for people: `3:07`, `1:02:03`; empty for none that a clock can show."""
    if not 0 <= seconds < 1e9:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class LineDisplay:
    """Lines for logs and pipes: one each 5 s and each tenth of the run, and every evaluation."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last_line = time.monotonic()
        self._last_tenth = 0

    def start(self, plan: Plan, recipe: Recipe) -> None:
        """Say what begins."""
        self._facts = _Facts(plan, recipe)
        self.message(self._facts.heading)

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """New rows; most of them pass silently."""
        facts, step = self._facts.of(rows), rows[-1].step
        tenth, now = 10 * step // self._facts.steps, time.monotonic()
        if tenth > self._last_tenth or now - self._last_line >= self.SECONDS:
            self._last_tenth, self._last_line = tenth, now
            self.message(facts)

    def evaluated(self, row: EvalRecord) -> None:
        """One line."""
        self.message(evaluation_text(row))

    def message(self, text: str) -> None:
        """One line."""
        write(text, sys.stderr)

    def close(self) -> None:
        """Nothing is open."""


class BarDisplay:
    """A bar at the bottom of a terminal, drawn when rows arrive, 4 times a second at most."""

    SECONDS = 0.25
    BAR = 24

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        text = TextColumn("{task.description}", markup=False)
        columns = (BarColumn(self.BAR), text) if console.width >= 110 else (text,)
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._last_drawn = 0.0
        self._gone = False

    def start(self, plan: Plan, recipe: Recipe) -> None:
        """Say what begins, and draw the empty bar."""
        self._facts = _Facts(plan, recipe)
        self.message(self._facts.heading)
        for before in self._progress.task_ids:  # an attempt that ended
            self._progress.remove_task(before)
        self._task = self._progress.add_task(f"step 0/{plan.steps}", total=plan.steps)
        self._draw(self._progress.start)

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """New rows: draw them unless the bar was drawn just now."""
        width = self._progress.console.width
        facts = self._facts.of(rows, room=width - self.BAR - 1 if width >= 110 else width)
        self._progress.update(self._task, completed=rows[-1].step, description=facts)
        if time.monotonic() - self._last_drawn >= self.SECONDS:
            self._draw(self._progress.refresh)
            self._last_drawn = time.monotonic()

    def evaluated(self, row: EvalRecord) -> None:
        """One line above the bar."""
        self.message(evaluation_text(row))

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._draw(self._progress.console.print, text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._draw(self._progress.refresh)
        self._draw(self._progress.stop)

    def _draw(self, draw: Callable[..., object], *arguments: str) -> None:
        """A terminal that is closed during a run takes the display away, not the run."""
        if self._gone:
            return
        try:
            draw(*arguments)
        except OSError:
            self._gone = True
            _discard_rest(sys.stderr)
            self._progress.stop()  # which gives stdout back
