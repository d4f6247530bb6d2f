"""Progress and tables on terminals, pipes, narrow screens and closed streams."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest

from mpcli.cli import console
from mpcli.cli.console import BarDisplay, LineDisplay, display, memory_text, show_table, write
from mpcli.recipe.errors import UserError
from mpcli.recipe.load import load_recipe
from mpcli.records import EvalRecord, Plan, StepRecord

STEPS = 100


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def training(recipe) -> Any:
    """Hand a display all that happens in a run of 100 steps, 2 rows at a time."""
    plan = Plan(
        device="cpu", world_size=1, num_train=1437, num_eval=360, data_source="digits",
        sample={"inputs": "fp32 1x8x8", "targets": "int64"}, steps=STEPS, steps_per_epoch=50,
        micro_batch_size=16, accumulation=1, parameters=1234, modules=(),
    )  # fmt: skip

    def row(step: int) -> StepRecord:
        return StepRecord(
            step=step, attempt=1, loss=1 / step, lr=0.1, grad_norm=1.0, scale=65536.0,
            applied=step != 3, samples_per_second=1234.5, memory_allocated_bytes=1,
            memory_peak_bytes=1,
        )  # fmt: skip

    def tell(shown: LineDisplay | BarDisplay) -> None:
        shown.start(plan, load_recipe(recipe).recipe)
        for step in range(1, STEPS, 2):
            shown.steps([row(step), row(step + 1)])
        shown.evaluated(
            EvalRecord(step=100, attempt=1, loss=0.25, accuracy=0.5, ema=False, seconds=1)
        )
        shown.close()

    return tell


def test_elsewhere_than_on_a_terminal_there_are_a_few_plain_lines(training, capsys):
    training(LineDisplay())
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "tiny: fp16 on cpu, 1,234 parameters, 1,437 samples, 100 steps of 16"
    assert lines[1].startswith("step 10/100  loss 0.1000  scale 65536  skipped 1  0:0")
    assert lines[1].endswith("1,234 samples/s")
    assert [line.split()[1] for line in lines[1:-1]] == [f"{n}/100" for n in range(10, 101, 10)]
    assert lines[-1] == "step 100: eval loss 0.2500, accuracy 50.00% (1.0 s)"
    assert captured.err.isprintable() or set(captured.err) & set("\r\x1b") == set()


def test_slow_runs_get_a_line_every_few_seconds(training, capsys, monkeypatch):
    now = iter(range(0, 100_000, 3))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    training(LineDisplay())
    assert len(capsys.readouterr().err.splitlines()) > 30


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (20, "step 100/100"),
        (40, "step 100/100  loss 0.0100  scale 65536"),
        (60, "step 100/100  loss 0.0100  scale 65536  skipped 1  0:00 left"),
        (80, "step 100/100  loss 0.0100  scale 65536  skipped 1  0:00 left  1,234 samples/s"),
    ],
)
def test_a_narrow_terminal_gets_the_facts_of_most_worth(training, monkeypatch, columns, shown):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    training(BarDisplay())
    assert _without_escapes(terminal.getvalue()).rstrip().endswith(f"\r{shown}")


@pytest.mark.parametrize("columns", ["120", "20"])
def test_a_terminal_gets_a_bar_that_is_redrawn(training, monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    shown = display()
    assert isinstance(shown, BarDisplay)
    training(shown)
    assert "\x1b[2K" in terminal.getvalue()  # erases the line
    assert "step 100/100" in terminal.getvalue()
    assert ("━" in terminal.getvalue()) == (columns == "120")


def test_the_bar_is_drawn_4_times_a_second_at_most(training, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    training(BarDisplay())
    assert terminal.getvalue().count("loss 0.") < STEPS / 2 / 4


def test_no_color_leaves_no_colors(training, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    training(BarDisplay())
    assert "\x1b[3" not in terminal.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display(), LineDisplay)


def test_tables_show_brackets_and_are_as_wide_as_their_rows_in_a_pipe(capsys):
    long = "x" * 300
    show_table("Title", ("", "from"), [("[flip, crop]", long), ("[/red]", "")])
    assert capsys.readouterr().out == (
        f"Title\n              from\n[flip, crop]  {long}\n[/red]\n\n"
    )


def table_on_a_terminal(monkeypatch, columns, header, rows) -> list[str]:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    show_table("Title", header, rows)
    return [line.rstrip() for line in _without_escapes(terminal.getvalue()).splitlines()]


@pytest.mark.parametrize("columns", [20, 38, 39])
def test_no_terminal_is_too_narrow_to_copy_a_path(monkeypatch, columns):
    path = "runs/some/very/long/path"
    lines = table_on_a_terminal(monkeypatch, columns, ("", ""), [("run directory", path)])
    assert lines[1] == f"run directory: {path}" if columns < 39 else f"run directory  {path}"


def test_lines_of_a_table_name_its_columns(monkeypatch):
    header, row = ("module", "type", "", "why"), ("stem.0", "Conv2d", "fp16", "x" * 30)
    lines = table_on_a_terminal(monkeypatch, 40, header, [row])
    assert lines == ["Title", f"stem.0: type Conv2d, fp16, why {'x' * 30}", ""]


def test_the_last_column_is_broken_between_words(monkeypatch):
    lines = table_on_a_terminal(monkeypatch, 40, ("", ""), [("digits-fp16", "two words " * 5)])
    assert lines == [
        "Title",
        "digits-fp16  two words two words two",
        "             words two words two words",
        "",
    ]


def _without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def fileno(self) -> int:
        return self.spare

    spare: int


@pytest.fixture
def full(tmp_path):
    with (tmp_path / "spare").open("w") as file:
        stream = Full()
        stream.spare = file.fileno()
        yield stream


def test_output_that_cannot_be_written_exits_7(monkeypatch, full):
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(UserError) as caught:
        write("text")
    assert caught.value.exit_code == 7


def test_progress_that_cannot_be_written_stops_nothing(monkeypatch, full):
    monkeypatch.setattr(sys, "stderr", full)
    write("text", sys.stderr)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(None, "unknown"), (5 * 2**20, "5MiB"), (3 * 2**29, "1.5GiB")],
)
def test_memory_in_words(num_bytes, text):
    assert memory_text(num_bytes) == text


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("mptrain schema | head -1", 0),
        ("mptrain schema >&-", 0),
        ("mptrain chekc 2>&-", 2),
        ("mptrain schema > /dev/full", 7),
        ("mptrain init > /dev/full", 7),
        ("mptrain --help > /dev/full", 7),
        ("PYTHONUNBUFFERED=1 mptrain run --help > /dev/full", 7),
        ("mptrain run --help | true", 0),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii mptrain check $'na\\xc3\\xafve.yaml'", 2),
        ("COLUMNS=20 TERM=dumb LANG=C mptrain --help", 0),
        ("COLUMNS=20 NO_COLOR=1 mptrain init", 0),
    ],
)
def test_no_stream_makes_a_traceback(mptrain_process, script, code):
    outcome = mptrain_process(script)
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    assert "\x1b" not in outcome.out
