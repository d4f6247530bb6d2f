"""One tree of nodes from a recipe, the fragments it uses and the overrides of the command line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpcli.recipe.errors import Place, Problem, UserError, did_you_mean, one_of
from mpcli.recipe.fields import kinds
from mpcli.recipe.nodes import Entry, Mapping, Node, Scalar, parse, plain
from mpcli.recipe.packaged import packaged_dir
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.render import visible
from mpcli.recipe.source import OVERRIDE, Source, check_characters, read_source

SECTIONS = tuple(name for name in Recipe.model_fields if name != "name")
_FRAGMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass
class Composition:
    """A tree of nodes without `use`, and what happened while it was composed."""

    tree: Mapping
    problems: list[Problem] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # path -> what happened
    lost: set[str] = field(default_factory=set)  # sections whose fragment cannot be had

    def merge(self, layer: Mapping) -> None:
        """Put a later layer on top: its values win, lists are replaced."""
        self.tree = self._merged(self.tree, layer, "")

    def _merged(self, base: Mapping, over: Mapping, path: str) -> Mapping:
        entries = dict(base.entries)
        for key, why in _outdated(base, over, path):
            gone = entries.pop(key)
            here = _join(path, key)
            # Nothing is lost with what every recipe of the old kind has, unless one of the new kind
            # has something else there: a resolved recipe has it all.
            if not (_is_null(gone.node) or _is_default(gone.node, base, over, path, key)):
                self.dropped[here] = visible(f"{here} ({position(gone.key)}) is dropped: {why}")
        for key, entry in over.entries.items():
            below = entries.get(key)
            if below and isinstance(below.node, Mapping) and isinstance(entry.node, Mapping):
                merged = self._merged(below.node, entry.node, _join(path, key))
                entries[key] = Entry(below.key, merged)
            else:
                entries[key] = entry
        return Mapping(entries, base.place)


def compose(recipe: Mapping, overrides: Sequence[str], folder: Path) -> Composition:
    """Fragments, the recipe's own keys, then fragments and values of the overrides.

    All overrides are one layer. A fragment that it names stands in the place of the recipe's for
    that section, and over the recipe's own keys.

    Args:
        recipe: root of the recipe file.
        overrides: `path=value` texts of `--set`.
        folder: the recipe's; fragments in its `configs` come before the packaged ones.
    """
    whole = Composition(Mapping({}, recipe.place))
    changes = _override_layer(overrides, whole.problems)
    ours, theirs = changes.entries.get("use"), recipe.entries.get("use")
    if theirs:
        _use_fragments(theirs, folder, whole, kind_only=_sections_of(ours))
    whole.merge(_part(recipe))
    if ours:
        _use_fragments(ours, folder, whole)
    whole.merge(_part(changes))
    return whole


def position(place: Place) -> str:
    """Where a value was written, in a few characters."""
    return place.file if place.file == OVERRIDE else f"{place.file}:{place.line}:{place.column}"


EITHER: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (("epochs", "steps"), ("steps", "epochs")),
    "task": (("model", "init_from"), ("init_from", "model")),
}
"""Keys of a section, the later of which removes the other."""


def _outdated(base: Mapping, over: Mapping, path: str) -> Iterator[tuple[str, str]]:
    """Keys of `base` that have no meaning under `over`, and why."""
    was, now = _value(base, "kind"), _value(over, "kind")
    if was is not None and now is not None and was != now:
        for key, entry in base.entries.items():
            replaced = key in over.entries and not isinstance(entry.node, Mapping)
            if key != "kind" and not replaced:
                yield key, f"{_join(path, 'kind')} is now {now}"
        return
    for key, other in EITHER.get(path, ()):
        named = key in over.entries and other not in over.entries
        if named and other in base.entries and not _is_null(over.entries[key].node):
            yield other, f"{path}.{key} is now {_value(over, key) or 'set'}"


def _is_default(node: Node, base: Mapping, over: Mapping, path: str, key: str) -> bool:
    """Whether a value is what its kind has without it, and the new kind has no other."""
    schema = Recipe.model_fields.get(path)
    fields = [
        kind.model_fields.get(key)
        for section in (base, over)
        if schema and (kind := kinds(schema).get(str(_value(section, "kind"))))
    ]
    known = [field.default for field in fields if field is not None]
    return bool(fields and fields[0]) and all(plain(node) == default for default in known)


def _value(mapping: Mapping, key: str) -> object:
    entry = mapping.entries.get(key)
    return entry.node.value if entry and isinstance(entry.node, Scalar) else None


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _part(layer: Mapping) -> Mapping:
    """A layer's own keys."""
    entries = {key: entry for key, entry in layer.entries.items() if key != "use"}
    return Mapping(entries, layer.place)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# Fragments


def _sections_of(use: Entry | None) -> Collection[str]:
    return use.node.entries if use and isinstance(use.node, Mapping) else ()


def _use_fragments(
    use: Entry, folder: Path, whole: Composition, kind_only: Collection[str] = ()
) -> None:
    """Merge the fragments; of sections in `kind_only` the kind, which says what the keys mean."""
    if not isinstance(use.node, Mapping):
        hint = "write `use: {section: fragment}`"
        whole.problems.append(Problem("expected a section", hint, "use", use.node.place))
        return
    for section, entry in use.node.entries.items():
        path = f"use.{section}"
        if section not in SECTIONS:
            meant = did_you_mean(section, SECTIONS)
            whole.problems.append(Problem("unknown section", meant, path, entry.key))
            continue
        replaced = section in kind_only
        try:
            fragment, problems = _fragment(section, entry.node, folder)
        except UserError as error:
            if not replaced:
                whole.problems += [Problem(p.what, p.hint, path, p.place) for p in error.problems]
                whole.lost.add(section)
            continue
        if replaced:
            kind = {key: value for key, value in fragment.entries.items() if key == "kind"}
            fragment, problems = Mapping(kind, fragment.place), []
        whole.problems += problems
        whole.merge(Mapping({section: Entry(entry.key, fragment)}, entry.key))


def _fragment(section: str, node: Node, folder: Path) -> tuple[Mapping, list[Problem]]:
    name = node.value if isinstance(node, Scalar) else None
    if not isinstance(name, str):
        raise _error("expected the name of a fragment", _known(section, folder), node.place)
    if not _FRAGMENT_NAME.fullmatch(name):
        hint = f"a name such as `adamw` stands for `configs/{section}/adamw.yaml`"
        raise _error("a fragment has a name, not a path", hint, node.place)
    for configs in (folder / "configs", packaged_dir("configs")):
        path = configs / section / f"{name}.yaml"
        try:
            source = read_source(path, str(path))
        except FileNotFoundError:
            continue
        root, problems = parse(source)
        if not isinstance(root, Mapping):
            raise source.error(0, 0, f"a fragment holds fields of `{section}`")
        if set(root.entries) == {section}:
            hint = f"remove the line `{section}:` and the indentation below it"
            place = root.entries[section].key
            raise _error(f"a fragment holds the fields of `{section}` themselves", hint, place)
        return root, problems
    names = _fragment_names(section, folder)
    raise _error(
        "no such fragment", did_you_mean(name, names) or _known(section, folder), node.place
    )


def _known(section: str, folder: Path) -> str:
    names = _fragment_names(section, folder)
    return f"fragments: {one_of(names)}" if names else f"there are none in `configs/{section}`"


def _fragment_names(section: str, folder: Path) -> list[str]:
    found = {
        path.stem
        for configs in (folder / "configs", packaged_dir("configs"))
        for path in (configs / section).glob("*.yaml")
    }
    return sorted(found)


def _error(what: str, hint: str | None, place: Place) -> UserError:
    return UserError(Problem(what, hint, place=place))


# Overrides


def _override_layer(overrides: Sequence[str], problems: list[Problem]) -> Mapping:
    layer = Mapping({}, Place(OVERRIDE, 1, 1))
    for number, text in enumerate(overrides, start=1):
        try:
            layer = _joined(layer, _override(text, number, problems), "")
        except UserError as error:
            problems += error.problems
    return layer


def _override(text: str, number: int, problems: list[Problem]) -> Mapping:
    """The tree of one `path=value`."""
    path, equals, value = text.partition("=")
    whole = Place(OVERRIDE, number, 1, max(1, len(path)), text)
    parts = path.split(".")
    if not equals:
        raise _error("expected `path=value`", "such as `--set optim.lr=0.1`", whole)
    if not all(parts) or path != path.strip():
        raise _error("expected a dotted path before `=`", "such as `--set optim.lr=0.1`", whole)
    source = Source(OVERRIDE, value, line=number, column=len(path) + 2, lines=(text,))
    if "\n" in text or "\r" in text:
        raise source.error(0, 0, "an override is one line", "write `[a, b]` or `{field: value}`")
    check_characters(Source(OVERRIDE, text, line=number, lines=(text,)))
    node, found = parse(source)
    problems += found
    node = node or Scalar(None, "", False, source.place(0, 0))
    column = len(path) + 1
    for part in reversed(parts):
        column -= len(part) + 1
        key = Place(OVERRIDE, number, column + 1, len(part), text)
        node = Mapping({part: Entry(key, node)}, key)
    assert isinstance(node, Mapping)
    return node


def _joined(one: Mapping, other: Mapping, path: str) -> Mapping:
    """Both trees, which must not disagree."""
    entries = dict(one.entries)
    for key, entry in other.entries.items():
        here, known = _join(path, key), entries.get(key)
        if known is None:
            entries[key] = entry
        elif isinstance(known.node, Mapping) and isinstance(entry.node, Mapping):
            entries[key] = Entry(known.key, _joined(known.node, entry.node, here))
        elif repr(plain(known.node)) != repr(plain(entry.node)):
            first, second = known.key.line, entry.key.line
            what = f"set to different values by override {first} and override {second}"
            raise UserError(Problem(what, "keep one of them", here, entry.key))
    return Mapping(entries, one.place)
