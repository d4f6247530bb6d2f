"""`mptrain init`."""

from __future__ import annotations

import shutil
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
            help="File (`x.yaml`) or folder to write; default: the current folder.",
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
            write_json({"templates": descriptions})
        else:
            show_table("Templates", ("", ""), descriptions.items())
        return
    if template not in templates:
        raise user_error(f"no template `{template}`", did_you_mean(template, templates))
    target = path or Path()
    if target.suffix not in (".yaml", ".yml") or target.is_dir():
        target = target / f"{template}.yaml"
    schema = target.parent / SCHEMA_FILE
    _write(target, templates[template], schema)
    if as_json:
        write_json({"written": [str(target), str(schema)]})
    else:
        write(f"wrote {target}")
        write(f"next: mptrain check {target} && mptrain run {target}", sys.stderr)


def _description(text: str) -> str:
    """The first comment line that is not an editor's modeline."""
    comments = (line.removeprefix("#").strip() for line in text.splitlines() if line[:1] == "#")
    return next(line for line in comments if not line.startswith("yaml-language-server"))


def _write(target: Path, text: str, schema: Path) -> None:
    from mpcli.recipe.packaged import packaged_dir

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
        shutil.copyfile(packaged_dir("recipes") / SCHEMA_FILE, schema)
    except FileExistsError:
        raise user_error(f"{target} exists already", "name another PATH, or remove it") from None
    except OSError as error:
        raise user_error(
            f"cannot write {error.filename}: {error.strerror}",
            "name a PATH in a folder that you can write to",
            exit_code=Exit.STORAGE,
        ) from error
