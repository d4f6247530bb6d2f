"""Texts that a command prints, kept in files beside the tests."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import pytest

from mpcli.cli.app import main

FOLDER = Path(__file__).parent / "cli" / "snapshots"


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, *arguments: str) -> str:
    """What a command prints there, without colours; it succeeds."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm")
        assert main(list(arguments)) == 0
    return plain(terminal.getvalue())


def plain(text: str) -> str:
    """Without colours, movements of the cursor, and blanks at the ends of lines."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def check(name: str, text: str) -> None:
    """Hold a text to its file; `UPDATE_SNAPSHOTS=1` writes it there, to be looked at."""
    path = FOLDER / name
    if os.environ.get("UPDATE_SNAPSHOTS"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")
