"""A recipe as YAML text that loads back to the same recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from mpcli.recipe.nodes import resolve
from mpcli.recipe.recipe import Recipe

_UNQUOTED = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./ -]*(?<! )")


def resolved_yaml(recipe: Recipe) -> str:
    """Every value of the recipe, defaults included, as a recipe file."""
    return "\n".join(_lines(recipe.model_dump(mode="json"), "")) + "\n"


def _lines(section: dict[str, Any], indent: str) -> Iterator[str]:
    for key in sorted(section, key=lambda key: key != "kind"):  # the kind first
        value = section[key]
        if isinstance(value, dict) and value:
            yield f"{indent}{written(key)}:"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{written(key)}: {written(value)}"


def written(value: Any) -> str:
    """A single value or a list as recipes write it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, str):
        if _UNQUOTED.fullmatch(value) and resolve(value) == value:
            return value
        escaped = json.dumps(value, ensure_ascii=False)
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
    return json.dumps(value)
