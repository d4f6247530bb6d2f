from __future__ import annotations

import math
from typing import Any

import pytest

from mpcli.recipe.errors import UserError
from mpcli.recipe.nodes import Mapping, Scalar, Sequence, key_place, parse, plain, resolve
from mpcli.recipe.source import text_source


def nodes(text: str) -> Any:
    root, problems = parse(text_source("r.yaml", text))
    assert not problems
    return root


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("false", False),
        ("0", 0),
        ("-0", 0),
        ("42", 42),
        ("-7", -7),
        ("1e-4", 1e-4),
        ("1e18", 1e18),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("0.0", 0.0),
        ("1.5e-3", 1.5e-3),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("1e400", math.inf),
        ("-1e400", -math.inf),
        ("9" * 5000, int("9" * 4000)),
        ("123456789012345678901234567890", 123456789012345678901234567890),
    ],
)
def test_unquoted_scalars_that_are_values(text: str, value: object) -> None:
    found = resolve(text)
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(resolve(".nan"))


TEXT = """
no yes on off y n True FALSE Null NULL None 0123 -012 00 01.5 12:30 1:30:00 1_000 0x10 0o17 0b1
2024-01-01 2024-01-01T00:00:00Z +-1 1e 1e+ . -. .e5 e5 1.2.3 1,000 inf nan = - --1 １２ ٣
"""


@pytest.mark.parametrize("text", TEXT.split())
def test_unquoted_scalars_that_stay_text(text: str) -> None:
    assert resolve(text) == text


@pytest.mark.parametrize("text", ['"1"', "'1'", '"true"', "'null'", '""'])
def test_quoted_scalars_are_text(text: str) -> None:
    assert nodes(f"a: {text}").entries["a"].node.value == text[1:-1]


def test_block_scalars_are_text() -> None:
    assert plain(nodes("a: |\n  12\nb: >\n  x\n  y\n")) == {"a": "12\n", "b": "x y\n"}


def test_places_of_keys_and_values() -> None:
    root = nodes("a: 1\nb:\n  c: [x, 'yz']\n  d: {e: null}\n")
    assert key_place(root, ("b", "c")).line == 3
    assert key_place(root, ("b", "c")).column == 3
    item = root.entries["b"].node.entries["c"].node.items[1]
    assert (item.place.line, item.place.column, item.place.length) == (3, 10, 4)
    assert item.place.text == "  c: [x, 'yz']"
    assert isinstance(root.entries["b"].node, Mapping)
    assert isinstance(root.entries["b"].node.entries["c"].node, Sequence)


def test_a_value_that_is_not_written_has_the_place_of_its_key() -> None:
    entry = nodes("a: 1\nempty:\n").entries["empty"]
    assert isinstance(entry.node, Scalar)
    assert entry.node.place == entry.key


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_places_do_not_depend_on_line_ends(end: str) -> None:
    place = nodes(end.join(["# 学習", "a: '学習'", "b: x", ""])).entries["b"].node.place
    assert (place.line, place.column, place.text) == (3, 4, "b: x")


def test_aliases_are_expanded() -> None:
    assert plain(nodes("a: &x {k: 1}\nb: [*x, *x]\n")) == {"a": {"k": 1}, "b": [{"k": 1}] * 2}


def test_a_document_start_is_allowed() -> None:
    assert plain(nodes("---\na: 1\n...\n")) == {"a": 1}


def test_tabs_are_allowed_in_comments() -> None:
    assert plain(nodes("a: 1 #\tx\n#\ty\n")) == {"a": 1}


def test_every_duplicate_and_tag_is_reported_at_once() -> None:
    _, problems = parse(text_source("r.yaml", "a: 1\na: 2\nb: !!str 3\nc: {<<: 1, d: 1, d: 2}\n"))
    assert [(p.place.line, p.what) for p in problems if p.place] == [
        (2, "`a` is set twice: in line 1 and here in line 2"),
        (3, "the tag `!!str` is not allowed"),
        (4, "merge keys (`<<`) are not supported"),
        (4, "`d` is set twice: in line 4 and here in line 4"),
    ]


def test_fifty_levels_and_ten_thousand_values_are_the_limit() -> None:
    assert plain(nodes("[" * 50 + "]" * 50))
    with pytest.raises(UserError, match="more than 50 levels"):
        nodes("[" * 51 + "]" * 51)
    assert len(plain(nodes("[" + "1, " * 9_999 + "]"))) == 9_999
    with pytest.raises(UserError, match="more than 10,000 values"):
        nodes("[" + "1, " * 10_000 + "]")
    with pytest.raises(UserError, match="more than 50 levels"):
        nodes("a: &x " + "[" * 30 + "]" * 30 + "\nb: " + "[" * 30 + "*x" + "]" * 30)


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("a: [1, [2]] # c", "[1, [2]]"),
        ("{a: {b: [1]}, c: 2}", "{b: [1]}"),
        ("a: [1,\n  2]", "[1,"),
        ("a:\n  - 1\n  - 2", "- 1"),
    ],
)
def test_the_place_of_a_list_or_section_is_what_it_covers_of_its_first_line(
    text: str, covered: str
) -> None:
    place = nodes(text).entries["a"].node.place
    assert place.text[place.column - 1 : place.column - 1 + place.length] == covered
