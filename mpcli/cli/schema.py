"""`mptrain schema`."""

from __future__ import annotations

from mpcli.cli.errors import write_json


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from mpcli.recipe.reference import json_schema

    write_json(json_schema())
