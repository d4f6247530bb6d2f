"""`mptrain check`."""

from __future__ import annotations

from mpcli.cli.console import write
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson, Overrides, PluginPath, RecipePath
from mpcli.cli.plugin import named_plugin


def check(
    recipe: RecipePath, overrides: Overrides, plugin: PluginPath = None, as_json: AsJson = False
) -> None:
    """Validate a recipe, without importing torch."""
    from mpcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides, named_plugin(plugin))
    if as_json:
        write_json({"status": "done", "exit_code": 0, "problems": []})
    else:
        write(f"{loaded.file}: ok")
