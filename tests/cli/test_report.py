"""`mptrain report` as a person calls it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.report.synthetic import made_up_run

Run = Callable[..., Outcome]


def test_the_newest_run_is_the_default(
    mptrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = made_up_run(tmp_path / "runs" / "made-up" / "20260101T000000Z-00000000", steps=5)
    (path.parent / "latest").symlink_to(path.name)
    told = mptrain("report")
    assert told.code == 0, told.err
    assert told.out.startswith("wrote report.html (")
    assert "20260101T000000Z-00000000" in Path("report.html").read_text()
    assert mptrain("report", "-o", "other.html", "--json").json == {
        "status": "done", "exit_code": 0, "file": "other.html",
        "bytes": Path("other.html").stat().st_size,
    }  # fmt: skip


def test_mistakes_are_told(mptrain: Run, tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run", steps=2)
    for arguments, code, told in (
        (["nowhere"], 2, "nowhere: no such folder"),
        ([tmp_path], 2, "not a run"),
        ([run, ""], 2, "a path is empty"),
        ([run, "-o", tmp_path], 2, "is a folder"),
        ([run, "-o", tmp_path / "no" / "file.html"], 2, "no such folder"),
    ):
        outcome = mptrain("report", *arguments)
        assert outcome.code == code, outcome
        assert told in outcome.err


def test_without_bokeh_the_extra_is_named(
    mptrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up_run(tmp_path / "run", steps=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = mptrain("report", run, "-o", tmp_path / "x.html")
    assert outcome.code == 3
    assert "pip install 'mptrain[report]'" in outcome.err


def test_it_imports_neither_torch_nor_bokeh_before_it_needs_to() -> None:
    script = (
        "import sys, mpcli.cli.app, mpcli.report.sources\n"
        "assert not {'torch', 'bokeh'} & set(sys.modules)\n"
        "import mpcli.report.charts\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
