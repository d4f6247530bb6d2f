"""Reading a stranger's files: ordinary ones only, within bounds, and nothing is executed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpcli.recipe.errors import Exit, UserError, user_error

MAX_JSON_BYTES = 2**24
_SPARE_BYTES = 2**30  # that reading a file may take beside what is in it


def unreadable(path: Path, reason: str) -> UserError:
    """A file that is damaged, or was made to do harm: exit 4."""
    return user_error(
        f"{path}: cannot be read: {reason:.200}",
        "nothing in it was executed; get it again from where it came from",
        exit_code=Exit.CHECKPOINT,
    )


def size_of(path: Path) -> int:
    """Bytes in an ordinary file.

    Raises:
        UserError: exit 4 for a folder, a pipe, a device, and what is not there.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise unreadable(path, "it is not an ordinary file")
    return status.st_size


def inside(folder: Path, name: str) -> Path:
    """A file of a folder.

    A link may lead to another file of the folder, and in a snapshot of the Hugging Face cache to
    the `blobs` beside it, where all of its files are.

    Raises:
        UserError: exit 4 for what leads elsewhere, and for what is not an ordinary file.
    """
    path = folder / name
    if name != Path(name).name or "\\" in name or "\0" in name:
        raise unreadable(folder, f"it names `{name}`, which is not a file in it")
    size_of(path)
    if path.is_symlink():
        homes = [folder.resolve()]
        if homes[0].parent.name == "snapshots":
            homes.append(homes[0].parents[1] / "blobs")
        if path.resolve().parent not in homes:
            raise unreadable(path, "it is a link to a file outside of its folder")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; NaN and Infinity are read, for transformers writes them.

    Raises:
        UserError: exit 4, also for a key that is there twice, and for more than `MAX_JSON_BYTES`.
    """
    if size_of(path) > MAX_JSON_BYTES:
        raise unreadable(path, f"it is larger than {MAX_JSON_BYTES} bytes")
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable(path, str(error)) from error


def parse_json(text: bytes) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
        ValueError: it is not one, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("it has a key twice")
    return value


@contextlib.contextmanager
def bounded_memory(num_bytes: int) -> Iterator[None]:
    """Let reading a file of a size take a little more memory than that (on Linux).

    In the block, whatever takes more ends in a MemoryError, or in what torch makes of one.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 2 * num_bytes + _SPARE_BYTES
    bounds = [bound for bound in (limit, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
