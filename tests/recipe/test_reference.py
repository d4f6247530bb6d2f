from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mpcli.recipe.fields import all_fields
from mpcli.recipe.reference import json_schema, recipe_reference


def test_the_reference_lists_every_field_with_a_meaning() -> None:
    rows = [row for row in recipe_reference().splitlines() if row.startswith("| `")]
    assert all(row.rstrip("| ").count("|") >= 4 for row in rows), "a field without a meaning"
    names = {row.split("`")[1] for row in rows} - {"use"}
    assert names == {name for _, name, _ in all_fields() if name != "kind"}


def test_the_schema_knows_every_section_and_use() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {
        *("use", "name", "task", "data", "precision", "optim"),
        *("train", "eval", "engine", "probe", "output"),
    }
    assert schema["additionalProperties"] is False


def test_the_schema_requires_nothing_that_a_fragment_could_give() -> None:
    assert not [node for node in _objects(json_schema()) if "required" in node]
    assert not [node for node in _objects(json_schema()) if "oneOf" in node]


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for value in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from _objects(value)
