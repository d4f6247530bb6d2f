"""Runs in a folder, and what they take up there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_EVERY_RUN = {"lock", "attempts"}  # has one of them at least, also where files were lost
_MARKS = _EVERY_RUN | {"recipe.yaml", "foreign.json", "steps.jsonl", "result.json"}


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories in a folder, at any depth, and folders that cannot be looked into.

    Links are not followed, and a run holds no other runs.
    """
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            with os.scandir(path) as entries:
                found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except FileNotFoundError:  # gone meanwhile
            continue
        except OSError:
            yield path
            continue
        if _EVERY_RUN & found.keys() and len(_MARKS & found.keys()) >= 2:
            yield path
        else:
            waiting += (path / name for name, is_folder in found.items() if is_folder)


def num_bytes(folder: Path) -> int:
    """Of all files in a folder; those that links lead to are not counted."""
    total, waiting = 0, [str(folder)]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    with contextlib.suppress(OSError):  # gone meanwhile
                        total += entry.stat(follow_symlinks=False).st_size
    return total
