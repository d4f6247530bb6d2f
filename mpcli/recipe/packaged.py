"""The recipes and fragments that come with the program."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).resolve().parent.parent


def packaged_dir(name: Literal["configs", "recipes"]) -> Path:
    """`mpcli/<name>` as installed from a wheel, `<checkout>/<name>` in an editable install."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def template_names() -> list[str]:
    """Names of the packaged recipes, without `.yaml`."""
    return sorted(path.stem for path in packaged_dir("recipes").glob("*.yaml"))
