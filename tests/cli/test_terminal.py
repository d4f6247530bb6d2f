"""A real run on a real (pseudo-)terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CTRL_C = b"\x03"


def on_a_terminal(
    folder: Path, *arguments: str, columns: int = 120, interrupt_after: str | None = None
) -> tuple[int, str]:
    """Exit code and everything written to the terminal, which sends Ctrl-C after some text."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        variables = {"COLUMNS": str(columns), "TERM": "xterm-256color"}
        tool = str(Path(sys.executable).with_name("mptrain"))
        os.execve(tool, ["mptrain", *arguments], os.environ | variables)
    output = b""
    with contextlib.suppress(OSError):  # EIO: the process has gone
        while data := os.read(terminal, 4096):
            output += data
            if interrupt_after is not None and interrupt_after.encode() in output:
                time.sleep(0.5)
                os.write(terminal, CTRL_C)
                interrupt_after = None
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode()


@pytest.mark.parametrize("columns", [120, 20])
def test_a_bar_grows_to_its_end_and_a_table_follows(recipe, columns):
    code, shown = on_a_terminal(recipe.parent, "run", "tiny.yaml", columns=columns)
    assert code == 0, shown
    assert "step 0/6" in shown
    assert "step 6/6" in shown
    assert "\r\x1b[2K" in shown
    assert "status" in shown.rpartition("Result")[2]


def test_ctrl_c_in_training_ends_it_with_130_and_a_table(recipe):
    code, shown = on_a_terminal(
        recipe.parent, "run", "tiny.yaml", "--set", "train.steps=100000",
        interrupt_after="step 0/100000",
    )  # fmt: skip
    assert code == 130, shown
    assert "interrupted" in shown.rpartition("Result")[2]
    assert "Traceback" not in shown


def test_ctrl_c_at_any_moment_of_the_start_ends_it_with_130(recipe):
    code = "import sys; from mpcli.cli import main; print('begin', flush=True); sys.exit(main())"
    options = ["--json", "--set", "train.steps=100000"]
    for tenths in range(1, 31, 3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, "run", recipe, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=recipe.parent,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(tenths / 10)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert "Traceback" not in err
        assert process.returncode == 130, err
        assert json.loads(out)["status"] == "interrupted"


def test_a_terminal_that_is_closed_takes_the_display_and_not_the_run(recipe, tmp_path):
    master, slave = pty.openpty()
    code = "import sys; from mpcli.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(recipe), "--output", "out", "--json",
         "--set", "train.steps=300"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=slave, text=True,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while b"step 0/300" not in shown:  # the bar is there
        shown += os.read(master, 65536)
    os.close(master)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert json.loads(out)["steps_attempted"] == 300
