"""The command line: parse, call, print. Importing it never loads torch."""

from __future__ import annotations

from mpcli.cli import interrupts


def main() -> int:
    """The `mptrain` command; its exit code. Ctrl-C is reported from the first import on."""
    interrupts.leave_at_once()
    try:
        from mpcli.cli.app import main

        return main()
    finally:
        interrupts.raise_again()
