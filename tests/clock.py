"""Time that passes only when a test says so."""

from __future__ import annotations

import pytest


class Clock:
    """Stands in for the module `time`; seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def stop_time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the training loop and of its records, until the test ends."""
    clock = Clock()
    for module in ("mpcli.trainer", "mpcli.intervals", "mpcli.outcomes"):
        monkeypatch.setattr(f"{module}.time", clock)
    return clock
