"""HTML that is safe by construction: all text is escaped, unless it was built here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpcli.records import strict_json

_VOID = ("input", "meta", "br")


class Html(str):
    """Markup; every other string is text."""


Content = str | None | Iterable[str | None]


def element(name: str, /, *content: Content, **attributes: str | bool | int | None) -> Html:
    """An element with what is in it.

    Args:
        content: text, which is escaped, and markup; several of them may come together.
        attributes: `class_` is `class`, `data_run` is `data-run`; False and None leave it out.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{together(*content)}</{name}>")


def together(*content: Content) -> Html:
    """Contents one after the other."""
    return Html("".join(map(_inner, content)))


def table(
    header: Sequence[str], rows: Iterable[Sequence[Content]], *, caption: str | None = None
) -> Html:
    """A table that scrolls by itself where it is too wide; the first cell of a row names it."""
    head = element("tr", [element("th", cell, scope="col") for cell in header])
    body = [
        element("tr", element("th", first, scope="row"), [element("td", cell) for cell in rest])
        for first, *rest in rows
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", caption) if caption else None,
            element("thead", head) if any(header) else None,
            element("tbody", body),
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption or header[0] or "table",
    )


def details(summary: str, *content: Content) -> Html:
    """Content that is shown when it is asked for."""
    return element("details", element("summary", summary), *content)


def json_script(name: str, value: Mapping[str, Any]) -> Html:
    """Data for a script: JSON in which nothing can end the element."""
    text = Html(strict_json(value).replace("<", "\\u003c"))
    return element("script", text, type="application/json", id=name)


def _attribute(name: str, value: str | bool | int | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'


def _inner(content: Content) -> str:
    if content is None:
        return ""
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return html.escape(content)
    return "".join(map(_inner, content))
