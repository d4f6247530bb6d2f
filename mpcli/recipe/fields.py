"""What the schema says about the places of a recipe: its sections, their kinds and fields."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mpcli.recipe.base import Section
from mpcli.recipe.nodes import Mapping, find
from mpcli.recipe.recipe import Recipe


def kinds(field: FieldInfo) -> dict[str, type[Section]]:
    """The sections that may stand in `field`, by their `kind`; empty for single values and lists.

    A section without kinds is found under `""`.
    """
    return _by_kind(field, Section)


def located(
    details: ErrorDetails, root: type[BaseModel], tree: Mapping
) -> tuple[tuple[str, ...], type[BaseModel]]:
    """A pydantic error's `loc` as a recipe path, and the section that holds the last field.

    `root` is the schema of what `tree` holds; a `loc` also has the chosen kind after a field with
    kinds, and names for the members of a union.
    """
    path: tuple[str, ...] = ()
    section: type[BaseModel] | None = root  # None: inside a value that is no section
    holder = root
    known: dict[str, type[BaseModel]] = {}
    *_, last = details["loc"] or ("",)
    for part in details["loc"]:
        inner = (*path, str(part))
        if part in known:
            section, known = known[str(part)], {}
        elif isinstance(part, int):
            path = inner
        elif find(tree, inner) or (part is last and details["type"] == "missing"):
            path = inner
            if section is not None:
                holder = section
                field = section.model_fields.get(part)
                known = _by_kind(field, BaseModel) if field else {}
                section = known.get("")
    return path, holder


@cache
def all_fields() -> tuple[tuple[str, str, type[Section]], ...]:
    """Every field of every section: (path of its section, name, section)."""
    return tuple(_walk("", Recipe))


def _walk(path: str, section: type[Section]) -> Iterator[tuple[str, str, type[Section]]]:
    for name, field in section.model_fields.items():
        yield path, name, section
        for inner in kinds(field).values():
            yield from _walk(f"{path}.{name}" if path else name, inner)


_Model = TypeVar("_Model", bound=BaseModel)


def _by_kind(field: FieldInfo, base: type[_Model]) -> dict[str, type[_Model]]:
    return {kind_of(model): model for model in _models(field.annotation, base)}


def _models(annotation: Any, base: type[_Model]) -> Iterator[type[_Model]]:
    if isinstance(annotation, type) and issubclass(annotation, base):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument, base)


def kind_of(section: type[BaseModel]) -> str:
    """The `kind` of a section, `""` for one without."""
    field = section.model_fields.get("kind")
    literals = get_args(field.annotation) if field else ()
    return str(literals[0]) if literals else ""
