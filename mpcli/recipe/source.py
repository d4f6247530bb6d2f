"""Text of a recipe and the places in it: what is read from disk before any YAML is parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from mpcli.recipe.errors import Place, Problem, UserError

MAX_BYTES = 1 << 20

OVERRIDE = "--set"
"""The file name of places in command-line overrides; their line is the override's number."""

# All but what YAML 1.2 calls printable, and the line breaks that editors do not count as lines.
_UNPRINTABLE = re.compile(
    "[\\0-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff\\ufeff\\ufffe\\uffff]"
)
_COMMENT = re.compile(r"(?:^|[ \t])#")


@dataclass(frozen=True)
class Source:
    """A text and where it came from.

    `line` and `column` are the place of the text's first character, and `lines` the lines to
    show: an override is parsed without its `path=` and shown with it.
    """

    file: str
    text: str
    line: int = 1
    column: int = 1
    lines: tuple[str, ...] = field(default=())

    def place(self, line: int, column: int, length: int = 1) -> Place:
        """The place of `length` characters from a line and column of the text, from 0."""
        lines = self.lines or (self.text,)
        if line >= len(lines):  # the end, for a parser that adds a line break
            return Place(self.file, self.line + len(lines) - 1, len(lines[-1]) + 1, 1, lines[-1])
        text = lines[line]
        column += self.column if line == 0 else 1
        return Place(self.file, self.line + line, column, max(length, 1), text)

    def error(self, line: int, column: int, what: str, hint: str | None = None) -> UserError:
        """A `UserError` at a line and column of the text, from 0."""
        return UserError(Problem(what, hint, place=self.place(line, column)))


def read_source(path: Path, file: str) -> Source:
    """Read a UTF-8 file of at most 1 MiB; `file` is its name in messages.

    Raises:
        UserError: the file cannot be read, is too large, is not UTF-8 or holds characters that
            have no business in a recipe.
        FileNotFoundError: there is no such file; the caller knows what else there is.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise _whole_file(file, "this is a folder, not a file") from None
    except ValueError:
        raise _whole_file(file, "a file name holds no NUL character") from None
    except OSError as error:
        raise _whole_file(file, f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise _whole_file(file, "larger than 1 MiB", "is this a recipe?")
    return text_source(file, decoded(content, file))


def text_source(file: str, text: str) -> Source:
    """The source of a file's text.

    Raises:
        UserError: the text holds a control character, or a tab outside a comment.
    """
    source = Source(file, text, lines=_split(text))
    check_characters(source)
    return source


def check_characters(source: Source) -> None:
    """Refuse control characters, and tabs outside comments."""
    found = _UNPRINTABLE.search(source.text)
    if found:
        before = _split(source.text[: found.start()])
        raise source.error(
            len(before) - 1,
            len(before[-1]),
            f"the character U+{ord(found[0]):04X} is not allowed in a recipe",
            "remove it",
        )
    if "\t" not in source.text:
        return
    for number, line in enumerate(_split(source.text)):
        tab = line.find("\t")
        comment = _COMMENT.search(line) if tab >= 0 else None
        if tab >= 0 and not (comment and comment.end() <= tab):
            raise source.error(number, tab, "a tab is not allowed here", "use spaces")


def decoded(content: bytes, file: str) -> str:
    """The text of a file.

    Raises:
        UserError: it is not UTF-8, with the first byte that is not.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("utf-8-sig", errors="surrogateescape")
    lines = _split(text)
    line, column = next(
        (number, found.start())
        for number, shown in enumerate(lines)
        if (found := re.search("[\udc80-\udcff]", shown))
    )
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    raise Source(file, text, lines=lines).error(
        line,
        column,
        f"the byte 0x{ord(lines[line][column]) - 0xDC00:02X} is not UTF-8 text",
        "the file is UTF-16: save it as UTF-8" if utf16 else "save the file as UTF-8",
    )


def _split(text: str) -> tuple[str, ...]:
    # Unlike `splitlines`, breaks lines where YAML does and nowhere else.
    return tuple(re.split(r"\r\n|\r|\n", text))


def _whole_file(file: str, what: str, hint: str | None = None) -> UserError:
    return UserError(Problem(what, hint, place=Place(file, 0, 0)))
