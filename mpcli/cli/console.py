"""What the person sees: data on stdout, progress on stderr, whatever either of them is."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mpcli.recipe.errors import Exit, user_error

if TYPE_CHECKING:
    from mpcli.recipe.recipe import Recipe
    from mpcli.records import EvalRecord, Plan, StepRecord
    from mpcli.trainer import Display


def prepare_streams() -> None:
    """Let no locale and no closed stream make printing fail."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write(text: str, stream: TextIO | None = None) -> None:
    """Print a line (on stdout by default). A reader who left early, such as `head`, is no error."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise user_error(
                f"cannot write to stdout: {error.strerror}", exit_code=Exit.STORAGE
            ) from error


def show_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout: as wide as a terminal, or as its rows elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
        show_header=any(header), header_style="dim",
    )  # fmt: skip
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as capture:
        console.print(table)
    write("\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n")


def memory_text(num_bytes: int | None) -> str:
    """Bytes for people, in binary units."""
    if num_bytes is None:
        return "unknown"
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


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
        self.started = time.monotonic()
        self.heading = (
            f"{recipe.name}: {recipe.precision.mode} on {plan.device}, "
            f"{plan.parameters:,} parameters, {plan.num_train:,} images, "
            f"{plan.steps:,} steps of {recipe.train.global_batch_size:,}"
        )

    def of(self, rows: Sequence[StepRecord]) -> str:
        """Step, loss, scale, skips, time left and speed after the newest of `rows`."""
        last = rows[-1]
        self.skipped += sum(not row.applied for row in rows)
        left = (time.monotonic() - self.started) / last.step * (self.steps - last.step)
        return (
            f"step {last.step}/{self.steps}  loss {last.loss:.4f}  scale {last.scale:g}  "
            f"skipped {self.skipped}  {_clock(left)} left  {last.samples_per_second:,.0f} samples/s"
        )


def _evaluation(row: EvalRecord) -> str:
    accuracy = "" if row.accuracy is None else f", accuracy {row.accuracy:.2%}"
    average = " with averaged weights" if row.ema else ""
    return f"step {row.step}: eval loss {row.loss:.4f}{accuracy}{average} ({row.seconds:.1f} s)"


def _clock(seconds: float) -> str:
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
        self.message(_evaluation(row))

    def message(self, text: str) -> None:
        """One line."""
        write(text, sys.stderr)

    def close(self) -> None:
        """Nothing is open."""


class BarDisplay:
    """A bar at the bottom of a terminal, drawn when rows arrive, 4 times a second at most."""

    SECONDS = 0.25

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        text = TextColumn("{task.description}", markup=False)
        columns = (BarColumn(bar_width=24), text) if console.width >= 110 else (text,)
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._last_drawn = 0.0

    def start(self, plan: Plan, recipe: Recipe) -> None:
        """Say what begins, and draw the empty bar."""
        self._facts = _Facts(plan, recipe)
        self.message(self._facts.heading)
        self._task = self._progress.add_task(f"step 0/{plan.steps}", total=plan.steps)
        self._progress.start()

    def steps(self, rows: Sequence[StepRecord]) -> None:
        """New rows: draw them unless the bar was drawn just now."""
        facts = self._facts.of(rows)
        self._progress.update(self._task, completed=rows[-1].step, description=facts)
        if time.monotonic() - self._last_drawn >= self.SECONDS:
            self._progress.refresh()
            self._last_drawn = time.monotonic()

    def evaluated(self, row: EvalRecord) -> None:
        """One line above the bar."""
        self.message(_evaluation(row))

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._progress.console.print(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._progress.refresh()
        self._progress.stop()
