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


def _templates() -> dict[str, Path]:
    from mpcli.recipe.packaged import templates

    return templates()


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
        descriptions = {name: _description(file) for name, file in templates.items()}
        if as_json:
            _write_done(templates=descriptions)
        else:
            show_table("Templates", ("", ""), descriptions.items())
        return
    if template not in templates:
        raise user_error(f"no template `{template}`", did_you_mean(template, templates))
    target, *others = _write(template, templates[template], path or Path())
    if as_json:
        _write_done(written=[str(target), *map(str, others)])
    else:
        plugins = [file for file in others if file.suffix == ".py"]
        write("\n".join(f"wrote {file}" for file in (target, *plugins)))
        options = [option for file in plugins for option in ("--plugin", str(file))]
        named = shlex.join([str(target), *options])
        write(f"next: mptrain check {named} && mptrain run {named}", sys.stderr)


def _write_done(**found: object) -> None:
    write_json({"status": "done", "exit_code": Exit.DONE, "problems": [], **found})


def _description(file: Path) -> str:
    """The first comment line that is not an editor's modeline."""
    text = file.read_text(encoding="utf-8")
    comments = (line.removeprefix("#").strip() for line in text.splitlines() if line[:1] == "#")
    return next(line for line in comments if not line.startswith("yaml-language-server"))


def _write(template: str, file: Path, path: Path) -> list[Path]:
    """Write a recipe to the file or into the folder `path`, its plug-in and the schema beside it.

    Returns:
        What was written: the recipe first, the schema last.
    """
    from mpcli.recipe.packaged import packaged_dir

    schema_text = (packaged_dir("recipes") / SCHEMA_FILE).read_text(encoding="utf-8")
    code = file.with_suffix(".py")
    texts = [file.read_text(encoding="utf-8")]
    if code.exists():
        texts.append(code.read_text(encoding="utf-8"))
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
        written: list[Path] = []
        try:
            for suffix, text in zip((target.suffix, ".py"), texts, strict=False):
                _create(target.with_suffix(suffix), text, "x")
                written.append(target.with_suffix(suffix))
            _create(schema, schema_text, "w")
        except OSError:
            for done in written:
                done.unlink()
            raise
    except FileExistsError as error:
        what = f"{error.filename} exists already"
        raise user_error(what, "name another PATH, or remove it") from None
    except OSError as error:
        raise user_error(
            f"cannot write {target}: {error.strerror}",
            "name a PATH in a folder that you can write to",
            exit_code=Exit.STORAGE,
        ) from error
    return [*written, schema]


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
