"""`mptrain report`."""

from __future__ import annotations

import os
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
    given = [Path(path) for path in paths] if paths else [newest_run()]
    try:
        _check_output(file, given)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise user_error(f"--output {output}: {error.strerror}", "name another file") from error
    page = report_page(read_sources(given)).encode("utf-8", "backslashreplace")
    try:
        _write(file, page)
    except OSError as error:
        raise user_error(f"--output {output}: {error.strerror}", exit_code=Exit.STORAGE) from error
    size = len(page)
    if as_json:
        write_json({"status": "done", "exit_code": Exit.DONE, "file": output, "bytes": size})
    else:
        write(f"wrote {output} ({size_text(size)})")


def _check_output(file: Path, given: list[Path]) -> None:
    if file.is_dir():
        raise user_error(f"--output {file}: is a folder", "name a file, such as report.html")
    if not file.parent.is_dir():
        raise user_error(f"--output {file}: no such folder", f"make {file.parent} first")
    _keep_inputs(file, given)


def _keep_inputs(file: Path, given: list[Path]) -> None:
    """Refuse to write over what a report is made of, which no page is."""
    real = Path(os.path.realpath(file))
    is_page = real.suffix == ".html"
    for path in given:
        source = Path(os.path.realpath(path))
        if real == source:
            raise user_error(f"--output {file}: is what a report reads", "name another file")
        if real.exists() and source in real.parents and not is_page:
            what = f"--output {file}: lies in {path}, which a report reads"
            raise user_error(what, "name an `.html`, or a file in another folder")


def _write(file: Path, page: bytes) -> None:
    """All of the page or nothing: a full disk leaves an older report as it is."""
    if file.exists() and not file.is_file():  # a pipe, say
        file.write_bytes(page)
        return
    file = Path(os.path.realpath(file))
    temporary = file.with_name(f".mptrain-{os.getpid()}.tmp")
    try:
        temporary.write_bytes(page)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
