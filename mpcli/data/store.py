"""Arrays on disk: written once, piece by piece, and memory-mapped from then on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mpcli.data.cache import cache_dir
from mpcli.recipe.errors import Exit, user_error

_log = logging.getLogger(__name__)
_INDEX = "index.json"
_DTYPES = ("|u1", "<i4", "<i8")

Arrays = dict[str, NDArray[Any]]
"""Arrays by name; memory-mapped, so they may be larger than memory."""


class Writer:
    """Arrays of uint8, int32 or int64 that grow along their first dimension."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._layouts: dict[str, dict[str, Any]] = {}

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Add values to the end of an array; none make it, if it is not there yet."""
        with _writing():
            if name not in self._files:
                self._files[name] = _file(self._folder, name).open("wb")
                dtype = values.dtype.newbyteorder("<").str
                self._layouts[name] = {"dtype": dtype, "shape": list(values.shape[1:])}
            self._files[name].write(values.astype(self._layouts[name]["dtype"]).tobytes())

    def finish(self, facts: dict[str, Any]) -> None:
        """Write what is left, and what the arrays are."""
        with _writing():
            for name, file in self._files.items():
                file.close()
                self._layouts[name]["sha256"] = _digest(_file(self._folder, name))
            index = {"facts": facts, "arrays": self._layouts}
            text = json.dumps({"index": index, "sha256": _index_digest(index)})
            (self._folder / _INDEX).write_text(text, "utf-8")

    def close(self) -> None:
        """Close the files, whatever is in them."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()


class _CannotWriteError(Exception):
    """An `OSError` that is not about the data that the arrays are made from."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CannotWriteError(error.strerror or str(error)) from error


def stored(key: str, make: Callable[[Writer], dict[str, Any]]) -> tuple[Arrays, dict[str, Any]]:
    """The arrays under a key of the cache, and facts about them; made where they are not intact.

    A cache that cannot be written costs a warning and the time to make them each time.

    Args:
        make: writes the arrays, and returns the facts, which must fit into JSON.

    Raises:
        UserError: exit 7, there is no other room for them either.
    """
    folder = cache_dir() / "arrays" / key
    found = _load(folder)
    if found is not None:
        return found
    try:
        return _make(folder, make)
    except _CannotWriteError as error:
        _log.warning("%s cannot be written: nothing is kept for the next run (%s)", folder, error)
    try:
        with _writing(), tempfile.TemporaryDirectory() as room:
            return _make(Path(room) / key, make)
    except _CannotWriteError as error:
        raise user_error(
            f"cannot write to the cache {folder.parent}, nor to {tempfile.gettempdir()}: {error}",
            "free some space, or set MPTRAIN_CACHE to a folder that can be written",
            exit_code=Exit.STORAGE,
        ) from error


def _make(folder: Path, make: Callable[[Writer], dict[str, Any]]) -> tuple[Arrays, dict[str, Any]]:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with _writing():
        temporary.mkdir(parents=True)
    try:
        with contextlib.closing(Writer(temporary)) as writer:
            writer.finish(make(writer))
        # What is mapped outlives its name, whatever other processes do to the folder.
        found = _load(temporary)
        assert found is not None, temporary
        with _writing():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                # Another process was faster, with the same content.
        return found
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path) -> tuple[Arrays, dict[str, Any]] | None:
    if not folder.exists():
        return None
    try:
        index, digest = json.loads((folder / _INDEX).read_bytes()).values()
        if _index_digest(index) != digest:
            raise ValueError("its index is not what was written")
        arrays = {
            name: _mapped(_file(folder, name), layout) for name, layout in index["arrays"].items()
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        _log.warning("%s is damaged and made again: %s", folder, error)
        return None
    return arrays, index["facts"]


def _mapped(path: Path, layout: dict[str, Any]) -> NDArray[Any]:
    if layout["dtype"] not in _DTYPES:
        raise ValueError(f"{path.name} has the type {layout['dtype']}")
    if _digest(path) != layout["sha256"]:
        raise ValueError(f"{path.name} is not what was written")
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros((0, *layout["shape"]), layout["dtype"])
    # "c": writable memory, as torch wants it, and a file that stays as it is.
    return np.memmap(path, layout["dtype"], mode="c").reshape(-1, *layout["shape"])


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _index_digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()
