"""Whether a process holds a lock, found out without taking it."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

_TABLE = Path("/proc/locks")
_HELD = re.compile(r"^\d+: FLOCK +\S+ +WRITE +(-?\d+) ([0-9a-f]+):([0-9a-f]+):(\d+) ", re.MULTILINE)


def is_held(path: Path) -> bool:
    """Whether a process of this machine holds the lock of a file.

    Linux has a list of all locks. Elsewhere it is tried for a moment, in which whoever wants the
    lock does not get it.
    """
    try:
        status = path.stat()
        table = _TABLE.read_text("ascii", "replace")
    except FileNotFoundError:
        return path.exists() and _is_refused(path)
    except OSError:
        return _is_refused(path)
    device = os.major(status.st_dev), os.minor(status.st_dev)
    for process, major, minor, inode in _HELD.findall(table):
        if int(inode) != status.st_ino:
            continue
        # Some file systems (btrfs) have another device in the list: then the process has to fit.
        if (int(major, 16), int(minor, 16)) == device or process == _holder(path):
            return True
    return False


def _holder(path: Path) -> str | None:
    """The process that took the lock last, as it says."""
    try:
        with path.open("rb") as file:
            return file.read(20).decode("ascii", "replace").strip()
    except OSError:
        return None


def _is_refused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
