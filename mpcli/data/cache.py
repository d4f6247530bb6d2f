"""Where what is made of a data set is kept, and what tells one data set from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def cache_dir() -> Path:
    """`$MPTRAIN_CACHE`, or `~/.cache/mptrain`."""
    return expand(os.environ.get("MPTRAIN_CACHE") or "~/.cache/mptrain")


def expand(path: str) -> Path:
    """A path with `~` resolved where there is such a home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, pathlib's raises where there is none


def content_key(name: str, files: Iterable[Path]) -> str:
    """A key that changes with the content and the order of the files, not with their names."""
    key = hashlib.sha256(name.encode())
    for path in files:
        with path.open("rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    return key.hexdigest()
