"""Programs that no package index has: from the distribution."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def program(find: Callable[[], str | None], lock: Path, *packages: str) -> str:
    """The path that `find` has, once the packages are installed.

    The test is skipped where it has none and apt cannot install them.

    Args:
        lock: a file; only one process of pytest-xdist installs.
    """
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if found := find():
            return found
        if shutil.which("apt-get") is None:
            pytest.skip(f"needs {packages[0]}, and there is no apt-get to install it")
        subprocess.run(["apt-get", "update"], check=False, capture_output=True, timeout=300)
        install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
        done = subprocess.run(install, check=False, capture_output=True, timeout=300)
        if found := find():
            return found
        pytest.skip(f"needs {packages[0]}; apt-get: {done.stderr.decode()[-200:]}")
