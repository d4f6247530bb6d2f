"""`--plugin FILE` of several commands: the one place where code is named."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from mpcli.recipe.errors import user_error
from mpcli.signals import uninterrupted

if TYPE_CHECKING:
    from mpcli.recipe.plugin import PluginFile
    from mpcli.rundir import RunDirectory


def named_plugin(path: str | None, sha256: str | None = None) -> PluginFile | None:
    """Run the named file; None where none is named.

    Args:
        sha256: that the file has to have.
    """
    if path is None:
        return None
    if path == "":
        raise user_error("`--plugin` names no file")
    from mpcli.recipe.plugin import load_plugin

    with uninterrupted():  # it imports torch
        return load_plugin(path, sha256)


def plugin_of_run(run: RunDirectory, path: str | None) -> PluginFile | None:
    """The plug-in of a run, named once more by the user.

    Raises:
        UserError: exit 2, none is named, or one where the run has none, or another.
    """
    recorded = run.plugin()
    if path is None and recorded:
        raise user_error(
            f"the run has a plug-in, {recorded.file} with the SHA-256 {recorded.sha256}; code is "
            "run only where it is named",
            f"add `--plugin {recorded.file}`, or the run's own copy: "
            f"`--plugin {shlex.quote(str(run.path / 'plugin.py'))}`",
        )
    if path is not None and not recorded:
        raise user_error(f"--plugin {path}: the run has no plug-in", "leave it out")
    return named_plugin(path, recorded.sha256 if recorded else None)
