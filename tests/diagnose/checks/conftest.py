"""Recordings of loops that are not ours, and what the checks say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mpcli.diagnose.checks import findings
from mpcli.diagnose.finding import Finding
from mpcli.diagnose.places import gather
from mpcli.diagnose.ranking import ranked
from mpcli.recorder import Recorder
from tests.recorder.conftest import _quick_environment  # noqa: F401

Said = Callable[..., list[Finding]]


@pytest.fixture
def said(tmp_path: Path) -> Said:
    """Records a loop, given the function and its arguments, and returns the ranked findings."""

    def diagnose(loop: Callable[..., None], *args: object, every: int = 2) -> list[Finding]:
        recorders = []

        def record(model, optimizer, scaler=None):
            recorders.append(Recorder(model, optimizer, scaler, out=tmp_path / "run", every=every))
            return recorders[0].step

        try:
            loop(*args, record)
        finally:
            recorders[0].close()
        return ranked(findings(gather(tmp_path / "run")))

    return diagnose
