"""`mptrain init`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mpcli.cli.console import show_table, write
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson
from mpcli.recipe.errors import Exit, did_you_mean, user_error

SCHEMA_FILE = "mptrain.schema.json"


def _templates() -> dict[str, str]:
    """Name and text of every shipped recipe."""
    from mpcli.recipe.packaged import packaged_dir

    files = sorted(packaged_dir("recipes").glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def init(
    template: Annotated[
        str | None,
        typer.Argument(
            help="Name of the template; without it, they are listed.",
            show_default=False,
            autocompletion=lambda: list(_templates()),
        ),
    ] = None,
    path: Annotated[
        Path | None,
        typer.Argument(
            help="File to write (`x.yaml`), or a folder; default: the current folder.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipe templates, or copy one to start from."""
    templates = _templates()
    if template is None:
        descriptions = {name: _description(text) for name, text in templates.items()}
        if as_json:
            _write_done(templates=descriptions)
        else:
            show_table("Templates", ("", ""), descriptions.items())
        return
    if template not in templates:
        raise user_error(f"no template `{template}`", did_you_mean(template, templates))
    target, schema = _write(template, templates[template], path or Path())
    if as_json:
        _write_done(written=[str(target), str(schema)])
    else:
        name = shlex.quote(str(target))
        write(f"wrote {target}")
        write(f"next: mptrain check {name} && mptrain run {name}", sys.stderr)


def _write_done(**found: object) -> None:
    write_json({"status": "done", "exit_code": Exit.DONE, "problems": [], **found})


def _description(text: str) -> str:
    """The first comment line that is not an editor's modeline."""
    comments = (line.removeprefix("#").strip() for line in text.splitlines() if line[:1] == "#")
    return next(line for line in comments if not line.startswith("yaml-language-server"))


def _write(template: str, text: str, path: Path) -> tuple[Path, Path]:
    """Write a recipe to the file or into the folder `path`, and the schema beside it."""
    from mpcli.recipe.packaged import packaged_dir

    schema_text = (packaged_dir("recipes") / SCHEMA_FILE).read_text(encoding="utf-8")
    target = path
    try:
        if path.is_dir():
            target = path / f"{template}.yaml"
        elif path.suffix not in (".yaml", ".yml"):
            what = "is no folder, and the name of a recipe ends in `.yaml`"
            hint = f"name a folder that is there, or `{path.with_suffix('.yaml')}`"
            raise user_error(f"{path}: {what}", hint)
        schema = target.parent / SCHEMA_FILE
        _make_folder(target.parent)
        _create(target, text, "x")
        try:
            _create(schema, schema_text, "w")
        except OSError:
            target.unlink()
            raise
    except FileExistsError:
        raise user_error(f"{target} exists already", "name another PATH, or remove it") from None
    except OSError as error:
        raise user_error(
            f"cannot write {target}: {error.strerror}",
            "name a PATH in a folder that you can write to",
            exit_code=Exit.STORAGE,
        ) from error
    return target, schema


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(error.errno, f"{folder} is a file") from error


def _create(path: Path, text: str, mode: str) -> None:
    """Write a file whole, or leave none."""
    with path.open(mode, encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise
