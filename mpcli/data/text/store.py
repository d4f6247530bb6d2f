"""Arrays on disk: written once, piece by piece, and memory-mapped from then on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mpcli.data.cache import cache_dir
from mpcli.recipe.errors import Exit, user_error

_log = logging.getLogger(__name__)
_INDEX = "index.json"

Arrays = dict[str, NDArray[np.int32]]
"""One-dimensional arrays by name; memory-mapped, so they may be larger than memory."""


class Writer:
    """Arrays of int32 that grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}

    def append(self, name: str, values: NDArray[np.int32]) -> None:
        """Add values to the end of an array."""
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.bin").open("wb")
        self._files[name].write(values.astype("<i4").tobytes())

    def close(self) -> None:
        """Write what is left."""
        for file in self._files.values():
            file.close()


def stored(key: str, make: Callable[[Writer], dict[str, Any]]) -> tuple[Arrays, dict[str, Any]]:
    """The arrays under a key of the cache, and facts about them; made where they are not intact.

    Args:
        make: writes the arrays, and returns the facts, which must fit into JSON.

    Raises:
        UserError: exit 7, the cache cannot be written.
    """
    folder = cache_dir() / "tokens" / key
    found = _load(folder)
    if found is None:
        with _writable(folder):
            _make(folder, make)
        found = _load(folder)
        assert found is not None, folder
    return found


def _make(folder: Path, make: Callable[[Writer], dict[str, Any]]) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with contextlib.closing(Writer(temporary)) as writer:
            facts = make(writer)
        digests = {path.stem: _digest(path) for path in sorted(temporary.glob("*.bin"))}
        index = {"facts": facts, "sha256": digests}
        (temporary / _INDEX).write_text(json.dumps(index), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process was faster, with the same content.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path) -> tuple[Arrays, dict[str, Any]] | None:
    if not folder.is_dir():
        return None
    try:
        index = json.loads((folder / _INDEX).read_bytes())
        paths = {name: folder / f"{name}.bin" for name in index["sha256"]}
        intact = all(_digest(path) == index["sha256"][name] for name, path in paths.items())
        facts: dict[str, Any] = index["facts"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("%s is damaged and made again: %s", folder, error)
        return None
    if not intact:
        _log.warning("%s is damaged and made again", folder)
        return None
    return {name: _mapped(path) for name, path in paths.items()}, facts


def _mapped(path: Path) -> NDArray[np.int32]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, np.int32)
    return np.memmap(path, "<i4", mode="r")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise user_error(
            f"cannot write to the cache {folder.parent}: {error.strerror or error}",
            "free some space, or set MPTRAIN_CACHE to a folder that can be written",
            exit_code=Exit.STORAGE,
        ) from error
