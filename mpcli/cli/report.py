"""`mptrain report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpcli.cli.console import write
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson
from mpcli.recipe.errors import Exit, user_error
from mpcli.sizes import size_text


def report(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...",
            help="Runs, sweeps, and files that `mptrain diagnose --json` printed; default: the "
            "newest run in `runs`.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")
    ] = "report.html",
    as_json: AsJson = False,
) -> None:
    """Show runs, sweeps and diagnoses in one HTML file."""
    from mpcli.report.page import report_page
    from mpcli.report.sources import read_sources
    from mpcli.rundir import newest_run

    if "" in (*(paths or ()), output):
        raise user_error("a path is empty", "`mptrain report --help` shows the usage")
    file = Path(output)
    if file.is_dir():
        raise user_error(f"--output {output}: is a folder", "name a file, such as report.html")
    if not file.parent.is_dir():
        raise user_error(f"--output {output}: no such folder", f"make {file.parent} first")
    page = report_page(read_sources([Path(path) for path in paths] if paths else [newest_run()]))
    try:
        file.write_text(page, "utf-8", errors="backslashreplace", newline="")
    except OSError as error:
        raise user_error(f"--output {output}: {error.strerror}", exit_code=Exit.STORAGE) from error
    size = file.stat().st_size
    if as_json:
        write_json({"status": "done", "exit_code": Exit.DONE, "file": output, "bytes": size})
    else:
        write(f"wrote {output} ({size_text(size)})")
