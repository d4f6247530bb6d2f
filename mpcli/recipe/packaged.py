"""The recipes and fragments that come with the program."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).resolve().parent.parent


def packaged_dir(name: Literal["configs", "recipes"]) -> Path:
    """`mpcli/<name>` as installed from a wheel, `<checkout>/<name>` in an editable install."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def templates() -> dict[str, Path]:
    """Name and file of every packaged recipe; a plug-in's stands in a folder with its code."""
    folder = packaged_dir("recipes")
    return {path.stem: path for path in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")])}
