"""Bytes on the disk, and what is said when they do not get there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpcli.recipe.errors import Exit, UserError, user_error

_LARGEST_JSON = 2**26


@contextlib.contextmanager
def storage_errors(path: Path, named: str = "the run directory") -> Iterator[None]:
    """Turn an OSError while writing below `path` into exit code 7.

    What goes wrong is recorded in the run directory, which never names its own path.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).replace(f"{path}{os.sep}", "")
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if is_full else "make it writable"
        raise user_error(
            f"cannot write to {named}: {reason}",
            f"{remedy}, or begin a new run elsewhere with `--output DIR`",
            exit_code=Exit.STORAGE,
        ) from error


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: exit 2 for other contents, 7 where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise user_error(f"{path}: {error.strerror}", exit_code=Exit.STORAGE) from error
    if len(content) > _LARGEST_JSON:
        raise user_error(f"{path}: is larger than 64 MiB", "is it what `mptrain` wrote?")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise user_error(f"{path}: is no JSON", "is it what `mptrain` wrote?") from error
    if not isinstance(found, dict):
        raise user_error(f"{path}: is no JSON object", "is it what `mptrain` wrote?")
    return found


def known_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none that can be read."""
    try:
        return read_object(path)
    except UserError:
        return {}
