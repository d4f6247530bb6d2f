"""YAML as nodes that know their place.

A recipe is the JSON-like part of YAML 1.2: mappings with text keys, lists and scalars. Tags, merge
keys, several documents and directives are refused, so is whatever would make a small file large
or deep. Scalars mean what they look like: `no`, `0123`, `12:30` and `2024-01-01` are text and
`1e-4` is a number, where YAML 1.1 readers say otherwise. Nothing is constructed but the types here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from typing import Any

import yaml

from mpcli.recipe.errors import Place, Problem, UserError
from mpcli.recipe.source import Source

MAX_NODES = 10_000
MAX_DEPTH = 50
MAX_PROBLEMS = 20

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value; `written` is its text in the file, quotes and escapes resolved."""

    value: bool | int | float | str | None
    written: str
    quoted: bool
    place: Place


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list."""

    items: tuple[Node, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Entry:
    """A field of a mapping: the place of its key, and its value."""

    key: Place
    node: Node


@dataclass(frozen=True, slots=True)
class Mapping:
    """Fields in the order written."""

    entries: MappingType[str, Entry]
    place: Place


Node = Scalar | Sequence | Mapping

_INT = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_NOT_FINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)|(\.nan|\.NaN|\.NAN)")


def resolve(text: str) -> bool | int | float | str | None:
    """The value of an unquoted scalar. A number beyond double precision is an infinity."""
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if _INT.fullmatch(text):
        return int(text[:4000])  # Python reads at most 4,300 digits, and no field takes as many
    if _FLOAT.fullmatch(text) and not _LEADING_ZERO.match(text):
        return float(text)
    if found := _NOT_FINITE.fullmatch(text):
        return float("nan") if found[2] else float(f"{found[1]}inf")
    return text


def plain(node: Node) -> Any:
    """The node as dicts, lists and scalars."""
    if isinstance(node, Mapping):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, Sequence):
        return [plain(item) for item in node.items]
    return node.value


def find(root: Node, path: tuple[str, ...]) -> Node | None:
    """The node at `path`, list items by number."""
    node: Node | None = root
    for part in path:
        if isinstance(node, Mapping):
            entry = node.entries.get(part)
            node = entry.node if entry else None
        elif isinstance(node, Sequence) and part.isdecimal() and int(part) < len(node.items):
            node = node.items[int(part)]
        else:
            return None
    return node


def key_place(root: Node, path: tuple[str, ...]) -> Place | None:
    """Where the last key of `path` is written; the item itself in a list."""
    parent = find(root, path[:-1]) if path else None
    if isinstance(parent, Mapping):
        entry = parent.entries.get(path[-1])
        return entry.key if entry else None
    node = find(root, path) if isinstance(parent, Sequence) else None
    return node.place if node else None


def parse(source: Source) -> tuple[Node | None, list[Problem]]:
    """Parse a text that holds one document.

    Returns:
        The root node (None for a text without content), and the problems that do not keep the
        rest from being understood.

    Raises:
        UserError: the text is not YAML, or not within the limits above. It holds the problems
            found so far too.
    """
    builder = _Builder(source)
    try:
        root = builder.document()
    except yaml.MarkedYAMLError as error:
        found = builder.problems[:MAX_PROBLEMS]
        raise UserError(*found, _syntax_problem(source, error)) from None
    except UserError as error:
        raise UserError(*builder.problems[:MAX_PROBLEMS], *error.problems) from None
    return root, builder.problems


class _Builder:
    """Builds nodes from parser events; as deep as `MAX_DEPTH` and no deeper."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self.events: Iterator[Any] = iter(yaml.parse(source.text, Loader=_Loader))
        self.count = 0
        self.anchors: dict[str, tuple[Node, int, int] | None] = {}  # None: not complete

    def document(self) -> Node | None:
        next(self.events)  # the stream begins
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        if event.version or event.tags:
            raise self.source.error(0, 0, "YAML directives are not allowed", "remove the `%` line")
        root, _ = self.node(next(self.events), 1)
        next(self.events)  # the document ends
        event = next(self.events)
        if isinstance(event, yaml.DocumentStartEvent):
            raise self.error(
                event,
                "a second document begins here",
                "a recipe is one document: remove this `---`",
            )
        return root

    def node(self, event: Any, depth: int) -> tuple[Node, int]:
        """The node that begins with `event`, and its height."""
        self.add(event, 1)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        anchor = event.anchor
        if anchor:
            self.anchors[anchor] = None
        if event.tag is not None:
            self.problems.append(
                Problem(
                    f"the tag `{_short_tag(event.tag)}` is not allowed",
                    "a recipe holds plain values only: remove the tag",
                    place=self.place(event),
                )
            )
        before = self.count
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node, height = self.scalar(event), 0
        else:
            self.check_depth(event, depth)
            build = self.mapping if isinstance(event, yaml.MappingStartEvent) else self.sequence
            node, height = build(event, depth)
        if anchor:
            self.anchors[anchor] = node, self.count - before, height
        return node, height

    def scalar(self, event: Any) -> Scalar:
        quoted = event.style not in (None, "")
        value = event.value if quoted or event.tag is not None else resolve(event.value)
        return Scalar(value, event.value, quoted, self.place(event))

    def sequence(self, event: Any, depth: int) -> tuple[Node, int]:
        items, height = [], 0
        while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
            node, below = self.node(item, depth + 1)
            items.append(node)
            height = max(height, below)
        return Sequence(tuple(items), self.place(event, item)), height + 1

    def mapping(self, event: Any, depth: int) -> tuple[Node, int]:
        entries: dict[str, Entry] = {}
        height = 0
        while not isinstance(first := next(self.events), yaml.MappingEndEvent):
            key, below = self.node(first, depth + 1)
            value, beside = self.node(next(self.events), depth + 1)
            height = max(height, below, beside)
            template = event.flow_style and not isinstance(key, Scalar)
            if problem := self.key_problem(key, event if template else first, entries):
                self.problems.append(problem)
                continue
            assert isinstance(key, Scalar)
            if isinstance(value, Scalar) and not value.written and not value.quoted:
                # Nothing is written that could be pointed at but the key.
                value = Scalar(None, "", False, key.place)
            entries[key.written] = Entry(key.place, value)
        return Mapping(entries, self.place(event, first)), height + 1

    def key_problem(self, key: Node, event: Any, known: dict[str, Entry]) -> Problem | None:
        place = self.place(event)
        if not isinstance(key, Scalar):
            hint = (
                "quote text that begins with `{` or `[`; templates such as `{{ x }}` are not filled"
            )
            return Problem("a field's name must be text", hint, place=place)
        if key.written == "<<" and not key.quoted:
            hint = "write the fields out, or share a section as a fragment: `use: {section: name}`"
            return Problem("merge keys (`<<`) are not supported", hint, place=place)
        if not isinstance(key.value, str):
            return Problem(f"a field's name must be text, found `{key.written}`", place=place)
        if key.value in known:
            line = known[key.value].key.line
            return Problem(
                f"`{key.value}` is set twice: in line {line} and here in line {place.line}",
                "keep one of them",
                place=place,
            )
        return None

    def alias(self, event: Any, depth: int) -> tuple[Node, int]:
        if event.anchor not in self.anchors:
            raise self.error(
                event,
                f"`*{event.anchor}` refers to nothing above",
                "quote text that begins with `*`",
            )
        target = self.anchors[event.anchor]
        if target is None:
            raise self.error(event, f"`*{event.anchor}` refers to the value that it is part of")
        node, size, height = target
        self.add(event, size)
        self.check_depth(event, depth + height - 1)
        return node, height

    def add(self, event: Any, count: int) -> None:
        self.count += count
        if self.count > MAX_NODES:
            raise self.error(event, f"more than {MAX_NODES:,} values, aliases expanded")

    def check_depth(self, event: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self.error(event, f"nested more than {MAX_DEPTH} levels deep")

    def error(self, event: Any, what: str, hint: str | None = None) -> UserError:
        return UserError(Problem(what, hint, place=self.place(event)))

    def place(self, event: Any, last: Any = None) -> Place:
        """What one event covers of its line; with its `last` event, what a list or section does."""
        start, end = event.start_mark, (last or event).end_mark
        place = self.source.place(start.line, start.column)
        length = len(place.text) - place.column + 1
        is_opening = isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent)
        if end.line == start.line and (not is_opening or (last and event.flow_style)):
            length = end.column - start.column
        return self.source.place(start.line, start.column, length)


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


# Without a space, a field and its value are text, and go on in the next line.
_NO_SPACE = re.compile(r"\s*([\w-]+:)(?=[^\s/])(?!.*: )")

# (words of the C or the Python parser, our words, remedy, whether the place is where the
# unfinished thing begins)
_SYNTAX: tuple[tuple[str, str, str | None, bool], ...] = (
    (
        "mapping values are not allowed",
        "a `:` is not expected here",
        "check the indentation; quote text that holds `: `",
        False,
    ),
    (
        "block sequence entries are not allowed",
        "a `-` is not expected here",
        "begin a list on its own line, or write `[a, b]`",
        False,
    ),
    (
        "could not find expected ':'",
        "a field needs `: ` after its name",
        "write `field: value`",
        True,
    ),
    (
        "expected ',' or ']'",
        "this list is not closed, or lacks a comma",
        "write `[a, b]`",
        True,
    ),
    (
        "expected ',' or '}'",
        "this mapping is not closed, or lacks a comma",
        "write `{field: value, field: value}`",
        True,
    ),
    (
        "found unexpected end of stream",
        "this quoted text is not closed",
        "add the closing quote",
        True,
    ),
    ("found unexpected document", "this quoted text is not closed", "add the closing quote", True),
    (
        "unknown escape character",
        "unknown escape in double-quoted text",
        "write `\\\\` for a backslash, or use single quotes",
        False,
    ),
    (
        "expected alphabetic or numeric character",
        "a name is expected after `*` or `&`",
        "quote text that begins with `*` or `&`",
        True,
    ),
    (
        "cannot start any token",
        "unquoted text cannot begin with this character",
        "put the text in quotes",
        False,
    ),
    (
        "expected key",
        "this line does not line up with the lines above",
        "fields of one section begin in the same column",
        False,
    ),
    (
        "expected <block end>",
        "this line does not line up with the lines above",
        "fields of one section begin in the same column",
        False,
    ),
    (
        "expected '-' indicator",
        "a list item is expected here",
        "begin each item of the list with `- `",
        False,
    ),
    ("node content", "a value is expected here", "put text of special characters in quotes", False),
    (
        "document start",
        "nothing is expected after the end of the document",
        "put text of special characters in quotes",
        False,
    ),
    ("directive", "YAML directives are not allowed", "remove the `%` line", True),
)


def _syntax_problem(source: Source, error: yaml.MarkedYAMLError) -> Problem:
    said = error.problem or error.context or "cannot be parsed"
    what, hint, at_start = next(
        ((what, hint, start) for words, what, hint, start in _SYNTAX if words in said),
        (f"not valid YAML: {said}", None, False),
    )
    mark = (error.context_mark if at_start else None) or error.problem_mark or error.context_mark
    if mark is None:
        return Problem(what, hint, place=source.place(0, 0))
    if "mapping values" in said and mark.line > 0:
        above = source.place(mark.line - 1, 0).text
        if joined := _NO_SPACE.match(above):
            place = source.place(mark.line - 1, joined.start(1), len(joined[1]))
            return Problem(
                "a field needs a space after its `:`", "write `field: value`", place=place
            )
    return Problem(what, hint, place=source.place(mark.line, mark.column))
