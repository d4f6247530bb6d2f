"""Bytes on the disk, and what is said when they do not get there."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mpcli.recipe.errors import Exit, user_error


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
