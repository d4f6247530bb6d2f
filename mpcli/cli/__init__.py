"""The command line: parse, call, print. Importing it never loads torch."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
from typing import NoReturn

from mpcli import signals


def main() -> NoReturn:
    """The `mptrain` command and its process's end. SIGTERM and Ctrl-C are handled from here on."""
    signals.install(_leave)
    try:
        from mpcli.cli.app import main

        code = main()
    finally:
        signals.ignore()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # taking the modules of torch apart would take seconds


def _leave(preempted: bool) -> NoReturn:
    """End the process at once, in any state: in the middle of an import, say.

    What is said is what other ends of a command say, without the modules that say it.
    """
    code, status = (75, "preempted") if preempted else (130, "interrupted")
    what = "ended by SIGTERM" if preempted else "interrupted"
    empty = dict.fromkeys(("file", "line", "column", "path", "hint", "finding"))
    problem = {**empty, "message": what, "severity": "error"}
    told = {"status": status, "exit_code": code, "problems": [problem]}
    with contextlib.suppress(OSError):
        os.write(2, f"error: {what}\n".encode())
    with contextlib.suppress(OSError):
        if "--json" in sys.argv:
            os.write(1, f"{json.dumps(told, indent=2)}\n".encode())
    os._exit(code)
