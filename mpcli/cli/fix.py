"""`--fix` of `mptrain diagnose`: the repaired recipe, in a file that was not there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpcli.cli.console import write
from mpcli.cli.plugin import plugin_of_run
from mpcli.recipe.errors import Exit, user_error
from mpcli.signals import check, held

if TYPE_CHECKING:
    from mpcli.diagnose.finding import Finding
    from mpcli.recipe.load import LoadedRecipe
    from mpcli.rundir import RunDirectory


def new_file(fix: str | None) -> Path | None:
    """The file of `--fix`, which can be written and is not there.

    Raises:
        UserError: exit 2, 7: it cannot be made.
    """
    if fix is None:
        return None
    path = Path(fix)
    if path.suffix not in (".yaml", ".yml"):
        raise user_error(f"--fix {fix}: a recipe is a `.yaml` file", "such as `--fix fixed.yaml`")
    if os.path.lexists(path):
        raise user_error(f"--fix {fix}: it exists already", "name a new file")
    if not path.parent.is_dir():
        raise user_error(f"--fix {fix}: no such folder", "make it first")
    with held():  # Ctrl-C leaves no empty file
        _write_new(path, "")  # to fail before the work, not after it
        path.unlink()
    check()
    return path


def _write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet; nothing is left of one that cannot be written."""
    try:
        stream = path.open("x", encoding="utf-8", newline="")
        try:
            with stream:
                stream.write(text)
        except BaseException:
            path.unlink()
            raise
    except OSError as error:
        what = f"--fix {path}: cannot be written: {error.strerror}"
        raise user_error(what, exit_code=Exit.STORAGE) from error


def write_fix(
    out: Path,
    causes: Sequence[Finding],
    run: RunDirectory | None,
    named: LoadedRecipe | None,
    plugin: str | None,
) -> Path | None:
    """The repaired recipe; None where nothing is to be changed in one, which is told."""
    from mpcli.diagnose.repair import overrides, repaired

    settings = overrides(causes)
    if not settings:
        write("--fix: nothing was found that a change of the recipe mends", sys.stderr)
        return None
    if run and not run.foreign():
        recipe, source, file = run.recipe_path, run.source_path, plugin_of_run(run, plugin)
    elif named:
        recipe = source = Path(named.file)
        file = named.plugin
    else:
        raise user_error("--fix: there is no recipe to repair", "name one with `--recipe`")
    text, own = repaired(recipe, source, settings, out.parent, file)
    if not own:
        write(
            "--fix: the recipe's own text uses fragments that do not lie beside the new file, so "
            "every value is written out, without the comments",
            sys.stderr,
        )
    _write_new(out, text)
    return out
