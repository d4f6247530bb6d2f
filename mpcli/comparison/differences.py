"""Where nested values differ, by dotted path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Flat = Mapping[str, Any]
"""Dotted path -> value that is no mapping."""


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested mappings and of lists of them, which their numbers stand for."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", values)]  # not recursive: files may nest very deep
    while waiting:
        path, value = waiting.pop()
        inner = list(_inner(value))
        if not inner:
            found[path] = value
        for key, item in reversed(inner):
            waiting.append((f"{path}.{key}" if path else key, item))
    found.pop("", None)
    return found


def _inner(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        yield from ((str(number), item) for number, item in enumerate(value))


def without_times(environment: Flat) -> Flat:
    """Without what was measured, which is another number each time."""
    return {path: environment[path] for path in environment if not path.endswith("relative_time")}


@dataclass(frozen=True)
class Differing:
    """A path and what each side has there.

    Attributes:
        values: of each side: the different ones of its runs. Empty: nothing is there; None:
            nothing is known of the side.
    """

    path: str
    values: tuple[tuple[Any, ...] | None, ...]


def differing(sides: Sequence[Sequence[Flat | None]]) -> list[Differing]:
    """The paths at which not all runs have the same.

    Args:
        sides: for each the values of its runs, None where they are not known.
    """
    known = [[values for values in side if values is not None] for side in sides]
    paths = dict.fromkeys(path for side in known for values in side for path in values)
    rows = []
    for path in paths:
        found = [[values.get(path, _NOTHING) for values in side] for side in known]
        first = next(value for side in found for value in side)
        if any(value != first for side in found for value in side):
            rows.append(Differing(path, tuple(_distinct(side) if side else None for side in found)))
    return rows


_NOTHING = object()


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    distinct: list[Any] = []
    for value in values:
        if value is not _NOTHING and value not in distinct:
            distinct.append(value)
    return tuple(distinct)
