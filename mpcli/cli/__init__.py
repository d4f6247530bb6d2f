"""The command line: parse, call, print. Importing it never loads torch."""

from __future__ import annotations


def main() -> int:
    """The `mptrain` command; its exit code. Ctrl-C is quiet from the first import on."""
    try:
        from mpcli.cli.app import main
    except KeyboardInterrupt:
        return 130
    return main()
