"""The schema for people and for editors, both made from the sections themselves."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import getdoc
from types import NoneType
from typing import Any, get_args

from pydantic.fields import FieldInfo

from mpcli.recipe.base import Section
from mpcli.recipe.compose import SECTIONS
from mpcli.recipe.dump import written
from mpcli.recipe.fields import kind_of, kinds
from mpcli.recipe.recipe import Recipe

_USE = (
    "| `use` | section | none | fragments to begin sections with, such as `use: {optim: sgd}` for "
    "`configs/optim/sgd.yaml` beside the recipe or of the program; the recipe's own fields win |"
)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors.

    It is more lenient than the loader: a field that a recipe lacks may come from a fragment.
    """
    schema = _lenient(Recipe.model_json_schema())
    schema["properties"]["use"] = {
        "description": "fragments to begin the sections with: `configs/<section>/<name>.yaml`",
        "type": "object",
        "properties": {section: {"type": "string"} for section in SECTIONS},
        "additionalProperties": False,
    }
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mptrain recipe"}
    return {**about, **{key: value for key, value in schema.items() if key not in about}}


def recipe_reference() -> str:
    """Markdown: a table of fields for each section and each of its kinds."""
    blocks = [_table(Recipe, extra=[_USE])]
    for path, sections in _by_path(Recipe, "").items():
        blocks.append(f"### `{path}`")
        for kind, section in sections.items():
            heading = f"`kind: {kind}` - " if kind else ""
            summary, *_ = str(getdoc(section)).split("\n\n")
            blocks.append(f"{heading}{summary}")
            if set(section.model_fields) - {"kind"}:
                blocks.append(_table(section))
    return "\n\n".join(blocks) + "\n"


def _lenient(schema: Any, *, is_properties: bool = False) -> Any:
    """The schema without required fields and generated titles, which only repeat the names."""
    if isinstance(schema, list):
        return [_lenient(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if is_properties:
        return {name: _lenient(value) for name, value in schema.items()}
    return {
        # Without required kinds, `oneOf` could fit several sections at once.
        "anyOf" if key == "oneOf" else key: _lenient(value, is_properties=key == "properties")
        for key, value in schema.items()
        if key not in ("required", "title", "discriminator")
    }


def _by_path(section: type[Section], path: str) -> dict[str, dict[str, type[Section]]]:
    """Dotted path -> kind -> section, in the order of the schema."""
    found: dict[str, dict[str, type[Section]]] = {}
    for name, field in section.model_fields.items():
        here = f"{path}.{name}" if path else name
        if known := kinds(field):
            found.setdefault(here, {}).update(known)
        for inner in known.values():
            for below, sections in _by_path(inner, here).items():
                found.setdefault(below, {}).update(sections)
    return found


def _table(section: type[Section], extra: Sequence[str] = ()) -> str:
    schema = section.model_json_schema()
    rows = ["| field | type | default | meaning |", "|---|---|---|---|", *extra]
    for name, field in section.model_fields.items():
        if name != "kind":
            type_ = "section" if kinds(field) else _type(schema["properties"][name])
            if NoneType in get_args(field.annotation):
                type_ = f"{type_} or `null`"
            rows.append(f"| `{name}` | {type_} | {_default(field)} | {_meaning(field)} |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory:
        return "depends"
    value = field.default
    if isinstance(value, Section):
        return f"`{{kind: {kind_of(type(value))}}}`" if kind_of(type(value)) else "its defaults"
    return f"`{written(value)}`"


def _meaning(field: FieldInfo) -> str:
    known = ", ".join(f"`{kind}`" for kind in kinds(field) if kind)
    about = [field.description or "", f"kinds: {known}" if known else ""]
    if not any(about):
        about = [str(section.__doc__).rstrip(".") for section in kinds(field).values()]
    return "; ".join(part for part in about if part)


def _type(schema: dict[str, Any]) -> str:
    """The JSON schema of a single value or a list, in a few words."""
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(choice) for choice in choices if choice.get("type") != "null")
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        items = [_type(item) for item in schema["prefixItems"]]
        return f"list of {len(items)}: {', '.join(dict.fromkeys(items))}"
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    names = {
        "integer": "whole number",
        "boolean": "`true`, `false`",
        "string": "text",
        "object": "section",
    }
    name: str = schema["type"]
    return names.get(name, name) + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    """The bounds that somebody could run into."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {schema[name]:g}"
        for name, sign in signs.items()
        if name in schema and (schema[name] == 0 or 1e-6 < schema[name] < 1e6)
    ]
    return f" {', '.join(bounds)}" if bounds else ""
