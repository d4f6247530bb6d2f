"""Plain text: files of UTF-8, cut into stretches of whole lines, or of words of a long one."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mpcli.data.cache import expand
from mpcli.data.text.records import Damage, Record, Source, Split, no_data, warn_of_shared
from mpcli.recipe.data import Text

STRETCH = 4000
"""Characters of a stretch, about, where its document does not end before; bytes of a line that is
read at once, at most."""
HELD_OUT = 10
"""One stretch of so many is held out, where no other text is."""


def find(data: Text) -> Source:
    """The files, by their names.

    Raises:
        UserError: exit 3, there are none.
    """
    files: dict[Split, tuple[Path, ...]] = {"train": _files(data.path, "data.path"), "eval": ()}
    about = data.path or "help topics of Python's standard library (embedded)"
    if data.eval_path is not None:
        files["eval"] = _files(data.eval_path, "data.eval_path")
        about += f", held out: {data.eval_path}"
        warn_of_shared(files)
    return Source(files, about, partial(_read, data))


def _files(path: str | None, field: str) -> tuple[Path, ...]:
    if path is None:
        from pydoc_data import topics

        return (Path(topics.__file__),)
    place = expand(path)
    if place.is_file():
        return (place,)
    files = tuple(sorted(place.rglob("*.txt"))) if place.is_dir() else ()
    if not files:
        what = f"no `.txt` file in {place}" if place.is_dir() else f"no file or folder {place}"
        raise no_data(what, "name a file of UTF-8 text, or a folder of `.txt` files", field)
    return files


def _read(data: Text, split: Split, damage: Damage) -> Iterator[Record]:
    """The held-out text is that of `eval_path`, or every tenth stretch."""
    if data.eval_path is not None:
        path = data.path if split == "train" else data.eval_path
        yield from _stretches(_documents(path, damage))
        return
    for number, record in enumerate(_stretches(_documents(data.path, damage)), 1):
        if (number % HELD_OUT == 0) == (split == "eval"):
            yield record


def _documents(path: str | None, damage: Damage) -> Iterator[Iterator[str]]:
    """The lines of every document, with their ends; long ones in pieces."""
    if path is None:
        from pydoc_data.topics import topics

        yield from (iter(topics[name].splitlines(keepends=True)) for name in sorted(topics))
        return
    yield from (_lines(file, damage) for file in _files(path, "data.path"))


def _lines(path: Path, damage: Damage) -> Iterator[str]:
    with path.open("rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        for number, piece in _pieces(file):
            try:
                text = piece.decode()
            except UnicodeDecodeError as error:
                damage.add(path, f"line {number}", f"is not UTF-8 ({error.reason})")
            else:
                yield text.replace("\r\n", "\n")


def _pieces(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines and their numbers; a line may also be without end, as in some corpora."""
    number, rest = 1, b""
    while piece := rest + file.readline(STRETCH - len(rest)):
        rest = b""
        if len(piece) == STRETCH and not piece.endswith(b"\n"):
            cut = piece.rfind(b" ", 1)
            if cut < 0:
                cut = _last_character(piece)
            piece, rest = piece[:cut], piece[cut:]
        yield number, piece
        number += piece.endswith(b"\n")


def _last_character(piece: bytes) -> int:
    """Where the last character of UTF-8 begins: it may not be whole, or be half a line's end."""
    end = len(piece) - 1
    return next((place for place in range(end, end - 4, -1) if piece[place] & 0xC0 != 0x80), end)


def _stretches(documents: Iterable[Iterator[str]]) -> Iterator[Record]:
    for lines in documents:
        stretch: list[str] = []
        size = 0
        for line in lines:
            if size >= STRETCH:
                yield Record(("".join(stretch),), ends=False)
                stretch, size = [], 0
            stretch.append(line)
            size += len(line)
        if stretch:
            yield Record(("".join(stretch),))
