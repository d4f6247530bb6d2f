"""What the schema says about the places of a recipe: its sections, their kinds and fields."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic.fields import FieldInfo

from mpcli.recipe.base import Section
from mpcli.recipe.recipe import Recipe


def kinds(field: FieldInfo) -> dict[str, type[Section]]:
    """The sections that may stand in `field`, by their `kind`; empty for single values and lists.

    A section without kinds is found under `""`.
    """
    return {kind_of(section): section for section in _sections(field.annotation)}


def located(
    loc: tuple[int | str, ...], root: type[Section]
) -> tuple[tuple[str, ...], type[Section]]:
    """A pydantic error's `loc` as a recipe path, and the section that holds the last field.

    `root` is the schema; `loc` has the chosen kind after a field with kinds, and names for the
    members of a union.
    """
    path: list[str] = []
    section: type[Section] | None = root  # None: inside a value that is no section
    holder = root
    known: dict[str, type[Section]] = {}
    for part in loc:
        if part in known:
            section, known = known[str(part)], {}
        elif section is not None:
            path.append(str(part))
            holder = section
            field = section.model_fields.get(str(part))
            known = kinds(field) if field else {}
            section = known.get("")
        elif isinstance(part, int):
            path.append(str(part))
    return tuple(path), holder


@cache
def all_fields() -> tuple[tuple[str, str, type[Section]], ...]:
    """Every field of every section: (path of its section, name, section)."""
    return tuple(_walk("", Recipe))


def _walk(path: str, section: type[Section]) -> Iterator[tuple[str, str, type[Section]]]:
    for name, field in section.model_fields.items():
        yield path, name, section
        for inner in kinds(field).values():
            yield from _walk(f"{path}.{name}" if path else name, inner)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def kind_of(section: type[Section]) -> str:
    """The `kind` of a section, `""` for one without."""
    field = section.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field else ""
