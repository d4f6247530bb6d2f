"""Ctrl-C before a command runs, told like any other end.

Imports and typer may swallow a `KeyboardInterrupt`, or end in silence. So until a command runs the
process ends at once; from there on the interrupt is raised as Python does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import NoReturn


def leave_at_once() -> None:
    """From here on Ctrl-C ends the process, unless somebody handles or ignores it already."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> NoReturn:
    """Say what other ends of a command say, without the modules that say it."""
    empty = dict.fromkeys(("file", "line", "column", "path", "hint", "finding"))
    problem = {**empty, "message": "interrupted", "severity": "error"}
    told = {"status": "interrupted", "exit_code": 130, "problems": [problem]}
    with contextlib.suppress(OSError):
        os.write(2, b"error: interrupted\n")
        if "--json" in sys.argv:
            os.write(1, f"{json.dumps(told)}\n".encode())
    os._exit(130)
