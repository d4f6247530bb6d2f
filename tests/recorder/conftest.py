"""A recorder whose run directory can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpcli.recorder import Recorder
from mpcli.records import LoopEvent
from mpcli.rundir import RunDirectory
from tests.recorder.loops import Step


class Recording:
    """Records one loop: `record` is what a loop calls."""

    def __init__(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.path = path
        self.caplog = caplog
        self.recorder: Recorder | None = None

    def record(self, model: Any, optimizer: Any, scaler: Any = None, *, every: int = 2) -> Step:
        self.recorder = Recorder(model, optimizer, scaler, out=self.path, every=every)
        return self.recorder.step

    def close(self) -> RunDirectory:
        """The run directory; a failure of the recorder itself, which ends no loop, ends a test."""
        assert self.recorder is not None
        self.recorder.close()
        assert not [r.getMessage() for r in self.caplog.records if r.levelname == "ERROR"]
        return RunDirectory.read(self.path)

    def events(self, step: int = 1) -> list[LoopEvent]:
        """Of the newest row that is not later than a step."""
        rows = [row for row in self.close().events() if row.step <= step]
        return list(rows[-1].events)


@pytest.fixture
def recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Recording]:
    recording = Recording(tmp_path / "run", caplog)
    yield recording
    if recording.recorder is not None:
        recording.close()


@pytest.fixture(autouse=True, scope="package")
def _quick_environment() -> Iterator[None]:
    """Precisions are tried once, not for every recorder."""
    import functools

    from mpcli.recorder import loop

    original = loop.environment
    loop.environment = functools.cache(original)
    yield
    loop.environment = original
