"""A real browser for pages. Chromium comes from the distribution: no package index has it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.debian import program


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none and apt cannot install it."""
    from playwright.sync_api import sync_playwright

    lock = tmp_path_factory.getbasetemp().parent / "chromium.lock"
    path = program(lambda: shutil.which("chromium"), lock, "chromium", "fonts-dejavu-core")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A report in a browser, and everything that it complained of or asked for."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self._context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page = page = self._context.new_page()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", self._dialog)
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)

    def close(self) -> None:
        """Close the page."""
        self._context.close()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """Open a report: `opened(file, width=1600, scheme="light")`."""
    pages: list[Page] = []

    def open_page(file: Path, width: int = 1600, scheme: str = "light") -> Page:
        pages.append(Page(chromium, file, width, scheme))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
