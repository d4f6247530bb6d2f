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
        ([run, "-o", "x" * 300], 2, "File name too long"),
        (["x" * 300], 2, "File name too long"),
        ([run, tmp_path / ("x" * 300)], 2, "File name too long"),
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


def test_what_a_report_is_made_of_is_never_written_over(mptrain: Run, tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run", steps=2)
    diagnosis, link = tmp_path / "d.json", tmp_path / "link.html"
    diagnosis.write_text('{"findings": []}')
    link.symlink_to(run / "steps.jsonl")
    inside = f"lies in {run}, which a report reads"
    for given, output, why in (
        (run, run / "recipe.yaml", inside), (run, run / "attempts/1/environment.json", inside),
        (run, link, inside), (diagnosis, diagnosis, "is what a report reads"),
    ):  # fmt: skip
        before = output.read_bytes()
        outcome = mptrain("report", given, "-o", output)
        assert (outcome.code, output.read_bytes()) == (2, before), outcome
        assert why in outcome.err
    for _ in range(2):  # a page is no input
        assert mptrain("report", run, "-o", run / "report.html").code == 0


def test_an_old_report_outlives_a_full_disk(mptrain_process: Run, tmp_path: Path) -> None:
    made_up_run(tmp_path / "run", steps=2)
    (tmp_path / "report.html").write_text("old")
    outcome = mptrain_process("ulimit -f 200; trap '' XFSZ; mptrain report run")
    assert (outcome.code, (tmp_path / "report.html").read_text()) == (7, "old"), outcome
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "run"]
    assert mptrain_process("mptrain report run -o /dev/stdout | grep -c '<!doctype'").out == "1\n"
