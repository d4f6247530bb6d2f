"""The live view of `mptrain watch`: redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mpcli.cli.console import clock_text, printed
from mpcli.recipe.render import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mpcli.watching import Watched

_SILENT = 10.0
"""Seconds without a new step that are worth telling."""
_BLOCKS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """Where a run is watched."""

    def __enter__(self) -> View: ...

    def __exit__(self, *error: object) -> None: ...

    def say(self, text: str) -> None:
        """A line that stays."""

    def show(self, watched: Watched, *, is_new: bool) -> None:
        """How the run stands now, and whether that is news."""


def view() -> View:
    """For the stdout that there is."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return LiveView()
    return LineView()


class ReaderLeft(Exception):
    """Nobody reads any more, as behind `| head`."""


class LineView:
    """A line each 5 s and each tenth of the run, where there is something new."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._last_line = -math.inf
        self._last_tenth = 0

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def say(self, text: str) -> None:
        """One line."""
        if not printed(visible(text)):
            raise ReaderLeft

    def show(self, watched: Watched, *, is_new: bool) -> None:
        """One line, now and then."""
        if not is_new or watched.last is None:
            return
        tenth, now = 10 * watched.last.step // (watched.steps or 10**13), time.monotonic()
        if tenth != self._last_tenth or now - self._last_line >= self.SECONDS:
            self._last_tenth, self._last_line = tenth, now
            self.say("  ".join(facts(watched)))


class LiveView:
    """A few lines at the bottom of a terminal, above which everything else goes by."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._last_step = time.monotonic()

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave it as it stands."""
        self._live.stop()

    def say(self, text: str) -> None:
        """A line above."""
        self._live.console.print(visible(text), soft_wrap=True)

    def show(self, watched: Watched, *, is_new: bool) -> None:
        """Draw it anew."""
        if is_new:
            self._last_step = time.monotonic()
        silent = time.monotonic() - self._last_step
        self._live.update(self._drawn(watched, silent), refresh=True)

    def _drawn(self, watched: Watched, silent: float) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._console.width
        lines: list[RenderableType] = []
        if watched.steps and watched.last:
            bar = Table.grid()  # which ends the line that a bar by itself leaves open
            bar.add_row(ProgressBar(watched.steps, watched.last.step, width=min(width, 60)))
            lines.append(bar)
        lines.append(Text(_fitting(facts(watched), width), no_wrap=True))
        if watched.last:
            lines.append(Text(_loss_line(watched, min(width, 60)), no_wrap=True))
        about = [_ranks(watched)] if watched.state == "running" else []
        if silent >= _SILENT and watched.state == "running":
            about.append(f"no new step for {clock_text(silent)}")
        if any(about):
            lines.append(Text("  ".join(filter(None, about)), no_wrap=True))
        return Group(*lines)


def heading(watched: Watched) -> str:
    """What is trained."""
    if foreign := watched.foreign:
        return (
            f"a {foreign.loop} loop: {foreign.model}, {foreign.parameters:,} parameters, "
            f"{foreign.optimizer}"
        )
    name, plan = watched.values.get("name", ""), watched.plan
    precision = watched.values.get("precision")
    mode = precision.get("mode", "") if isinstance(precision, dict) else ""
    about = [f"{name}: {mode}"]
    if plan:
        about = [f"{name}: {mode} on {plan.device}", f"{plan.parameters:,} parameters"]
        about += [f"{plan.world_size} processes"] if plan.world_size > 1 else []
        about += [f"{plan.num_train:,} samples", f"{plan.steps:,} steps"]
    return ", ".join(about)


def facts(watched: Watched) -> list[str]:
    """What is so after the newest step, by worth."""
    last, steps = watched.last, watched.steps
    of = f"/{steps:,}" if steps else ""
    if last is None:
        return [f"step 0{of}"]
    left = watched.seconds_left
    return [
        f"step {last.step:,}{of}",
        f"loss {last.loss:.4g}",
        f"scale {last.scale:g}",
        f"skipped {watched.skipped:,}",
        *([f"{clock_text(left)} left"] if left is not None and clock_text(left) else []),
        *([f"{watched.speed:,.0f} samples/s"] if watched.speed else []),
    ]


def _fitting(facts: Sequence[str], room: int) -> str:
    shown = list(facts)
    while len(shown) > 1 and len("  ".join(shown)) > room:
        shown.pop()
    return "  ".join(shown)


def _loss_line(watched: Watched, width: int) -> str:
    """The loss from the first step to the last, its largest and its least mean."""
    room = max(8, width - len("loss   0.0000 to 0.0000"))
    means = watched.losses.means(room)
    finite = [mean for mean in means if math.isfinite(mean)]
    between = f"  {min(finite):.4g} to {max(finite):.4g}" if finite else ""
    return f"loss {sparkline(means)}{between}"


def sparkline(values: Sequence[float]) -> str:
    """A character for each value; `×` for those that are not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "×" * len(values)
    least, most = min(finite), max(finite)
    span = most - least
    if not 0 < span < math.inf:
        return "".join(_BLOCKS[0] if math.isfinite(value) else "×" for value in values)
    last = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[round(last * ((value - least) / span))] if math.isfinite(value) else "×"
        for value in values
    )


def _ranks(watched: Watched) -> str:
    """Where several processes are."""
    beats = watched.run.heartbeats() if watched.plan and watched.plan.world_size > 1 else {}
    if not beats:
        return ""
    least, most = min(b.step for b in beats.values()), max(b.step for b in beats.values())
    if most == 0:
        return f"{len(beats)} processes, before step 1"
    where = f"step {least:,}" if least == most else f"steps {least:,} to {most:,}"
    return f"{len(beats)} processes in {where}"
