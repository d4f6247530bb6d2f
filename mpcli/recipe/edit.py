"""Values of a recipe changed in its text, where they stand: comments and everything else stay."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mpcli.recipe.dump import written

_Path = tuple[str, ...]


def with_value(text: str, path: _Path, value: Any) -> str:
    """A recipe's text with another value at a path; sections on the way there are made.

    Args:
        text: valid YAML whose root is a mapping.
        path: of keys.
        value: a scalar, a list, or a section as a dict. A section takes the place of the one that
            is there: fields of that which it has not are removed, with their comments.
    """
    node: yaml.Node = _root(text)
    depth = 0
    while depth < len(path):
        assert isinstance(node, yaml.MappingNode)
        found = _entry(node, path[depth])
        if found is None:
            return _with_entry(text, node, path[depth], _nested(path[depth + 1 :], value))
        node, depth = found[1], depth + 1
        if depth < len(path) and not isinstance(node, yaml.MappingNode):
            return _replaced(text, node, _nested(path[depth:], value))
    if isinstance(value, dict) and _is_block(node):
        for key, _ in reversed(node.value):  # removing changes what comes after
            if key.value not in value:
                text = without(text, (*path, key.value))
        for key, inner in value.items():
            text = with_value(text, (*path, key), inner)
        return text
    return _replaced(text, node, value)


def with_other(text: str, path: _Path, key: str, value: Any) -> str:
    """A recipe's text with another field of the same section in place of the one at a path.

    Args:
        text: valid YAML whose root is a mapping.
        path: of the field that goes; the text need not have it.
        key: of the other one.
        value: of the other one, as `with_value` takes it.
    """
    other = (*path[:-1], key)
    old = _found(text, path)
    if old and _found(text, other):
        text, old = without(text, path), None
    if old is None:
        return with_value(text, other, value)
    begin, end = old[0].start_mark.index, _end(old[1])
    return f"{text[:begin]}{written(key)}: {_flow(value)}{text[end:]}"


def without(text: str, path: _Path) -> str:
    """A recipe's text without the field at a path, which is there, and its comment."""
    node: yaml.Node = _root(text)
    for part in path[:-1]:
        node = _known_entry(node, part)[1]
    key, value = _known_entry(node, path[-1])
    if _is_block(node):
        begin = text.rfind("\n", 0, key.start_mark.index) + 1
        end = text.find("\n", _end(value))
        return text[:begin] + ("" if end < 0 else text[end + 1 :])
    begin, end = key.start_mark.index, _end(value)
    comma = re.compile(r"\s*,\s*").match(text, end)
    if comma:
        return text[:begin] + text[comma.end() :]
    return re.sub(r"\s*,\s*\Z", "", text[:begin]) + text[end:]


def _root(text: str) -> yaml.MappingNode:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return root


def _entry(node: yaml.Node, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next((pair for pair in node.value if pair[0].value == key), None)


def _found(text: str, path: _Path) -> tuple[yaml.Node, yaml.Node] | None:
    """The key and the value at a path."""
    found: tuple[yaml.Node, yaml.Node] | None = None
    node: yaml.Node = _root(text)
    for key in path:
        found = _entry(node, key) if isinstance(node, yaml.MappingNode) else None
        if found is None:
            return None
        node = found[1]
    return found


def _known_entry(node: yaml.Node, key: str) -> tuple[yaml.Node, yaml.Node]:
    found = _entry(node, key)
    if found is None:
        raise KeyError(key)
    return found


def _is_block(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode) and not node.flow_style


def _end(node: yaml.Node) -> int:
    """Where the last character of a node ends: a block's own mark is at what follows it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    end: int = node.end_mark.index
    return end


def _nested(path: _Path, value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{written(key)}: {_flow(inner)}' for key, inner in value.items())}}}"
    return written(value)


def _replaced(text: str, node: yaml.Node, value: Any) -> str:
    begin, end = node.start_mark.index, _end(node)
    space = " " if begin and text[begin - 1] == ":" else ""  # `key:` without a value
    return text[:begin] + space + _flow(value) + text[end:]


def _with_entry(text: str, node: yaml.MappingNode, key: str, value: Any) -> str:
    """A new field at the end of a mapping."""
    entry = f"{written(key)}: {_flow(value)}"
    if node.flow_style:
        end = node.end_mark.index - 1
        separator = ", " if node.value else ""
        before = text[:end].rstrip()
        return before + separator + entry + text[end:]
    last = _end(node)
    end = text.find("\n", last)
    indent = " " * node.value[0][0].start_mark.column
    if end < 0:
        return f"{text}\n{indent}{entry}\n"
    return f"{text[: end + 1]}{indent}{entry}\n{text[end + 1 :]}"
