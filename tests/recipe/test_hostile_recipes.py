"""Files made to hurt: refused with a place and words, within a second of CPU time, run nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.render import render_problem

MIB = 1 << 20
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20)
)
HUGE = {
    "brackets": "[" * MIB,
    "braces": "{" * MIB,
    "nested fields": "{a: " * (MIB // 4),
    "nested items": "- " * (MIB // 2),
    "complex keys": "? " * (MIB // 2),
    "one word": "a" * MIB,
    "one quoted text": "'" + "a" * (MIB - 1),
    "escapes": '"' + "\\x41" * (MIB // 4 - 1) + '"',
    "comments": "#\t\n" * (MIB // 3),
    "empty lines": "\n" * MIB,
    "spaces": " " * MIB,
    "fields": "".join(f"k{i}: v\n" for i in range(90_000)),
    "unknown fields": "".join(f"field_{i}: {i}\n" for i in range(4_990)),
    "wrong values": "optim: {" + "".join(f"momentum{i}: .nan, " for i in range(4_900)) + "}",
    "duplicates": "a: b\n" * (MIB // 5),
    "tags": "[" + "!x a," * 200_000 + "]",
    "anchors": "[" + "".join(f"&a{i} x," for i in range(90_000)) + "]",
    "aliases": "a: &a x\nb: [" + "*a," * 300_000 + "]",
    "wide lines": "a: " + ("x" * 1000 + "\n ") * 1000,
    "digits": "name: " + "9" * 900_000,
    "exponent": "optim: {kind: sgd, lr: 1e" + "9" * 900_000 + "}",
    "long kind": "optim: {kind: " + "sg" * 500_000 + "}",
    "long key": "x" * 1000 + ": 1\n",
    "long items": "data: {kind: cifar10, augment: [" + "flop, " * 9_000 + "]}",
    "directives": "%a\n" * (MIB // 3),
    "documents": "---\n" * (MIB // 4),
    "alias bomb": BOMB,
}


def refused(path: str | Path) -> UserError:
    gc.freeze()  # what other tests left in memory is not searched for garbage meanwhile
    began = time.thread_time()
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    shown = "\n".join(map(render_problem, caught.value.problems))
    took = time.thread_time() - began
    gc.unfreeze()
    assert took < 1
    assert shown.startswith(str(path))
    assert len(shown) < 50_000
    assert caught.value.exit_code == Exit.USAGE
    return caught.value


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_a_megabyte_of_anything(text: str, write: Callable[..., str]) -> None:
    assert len(text) <= MIB
    refused(write(text))


def test_more_than_a_megabyte(write: Callable[..., str]) -> None:
    assert "larger than 1 MiB" in str(refused(write("#" * (MIB + 1))))


def test_an_endless_file() -> None:
    assert "larger than 1 MiB" in str(refused("/dev/zero"))


def test_an_alias_bomb_is_named(write: Callable[..., str]) -> None:
    assert "more than 10,000 values, aliases expanded" in str(refused(write(BOMB)))


def test_an_anchor_that_refers_to_itself(write: Callable[..., str]) -> None:
    assert "the value that it is part of" in str(refused(write("a: &a [*a]\n")))


def test_a_folder(write: Callable[..., str], tmp_path: Path) -> None:
    write()
    assert "this is a folder" in str(refused(tmp_path))


@pytest.mark.parametrize("name", ["no\0such.yaml", "no" * 300, "recipe.yaml/inner.yaml"])
def test_paths_that_cannot_be(name: str, write: Callable[..., str]) -> None:
    write()
    with pytest.raises(UserError):
        load_recipe(name)


@pytest.mark.parametrize("character", ["\0", "\x07", "\x1b", "\x7f", "\x85", "\u2028", "\ufeff"])
def test_control_characters(character: str, write: Callable[..., str]) -> None:
    error = refused(write(f"name: x\ndata: a{character}b\n"))
    place = error.problems[0].place
    assert place is not None
    assert (place.line, place.column) == (2, 8)


def test_tags_construct_nothing(write: Callable[..., str], tmp_path: Path) -> None:
    made = tmp_path / "made"
    tag = f"!!python/object/apply:os.mkdir ['{made}']"
    assert "is not allowed" in str(refused(write(f"name: {tag}\n")))
    assert not made.exists()


def test_a_message_cannot_drive_the_terminal(write: Callable[..., str]) -> None:
    text = 'name: "\\e[2J"\n"\\e]0;x\\a": 1\noptim: {kind: "\\u202Edgs"}\n'
    shown = "".join(map(render_problem, refused(write(text)).problems))
    assert not set("\x1b\x07\u202e") & set(shown)
