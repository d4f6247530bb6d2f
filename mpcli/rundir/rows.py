"""Files of rows: one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

from mpcli.records import Record
from mpcli.rundir.storage import storage_errors, sync

LONGEST_ROW = 65536

Row = TypeVar("Row", bound=Record)


def read_rows(path: Path, kind: type[Row], unread: Counter[str] | None = None) -> Iterator[Row]:
    """The rows of a file, one at a time: it may be long.

    Args:
        unread: counts, by the file's name, the lines that cannot be read, which are left out.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        while line := file.readline(LONGEST_ROW):
            try:
                row = kind.model_validate_json(line)
            except ValueError:
                if unread is not None and (line.endswith(b"\n") or len(line) < LONGEST_ROW):
                    unread[path.name] += 1
            else:
                yield row


class Tail(Generic[Row]):
    """The rows of a file that grows, as they come; lines that cannot be read are left out."""

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self._path, self._kind = path, kind
        self._begin = self._end = 0  # of the lines that `read` gave

    def read(self, most: int) -> list[Row]:
        """The next rows, at most so many; the same ones again until `advance`."""
        rows: list[Row] = []
        self._end = self._begin
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._begin)
            while len(rows) < most:
                line = file.readline(LONGEST_ROW)
                if not line.endswith(b"\n") and len(line) < LONGEST_ROW:
                    break  # it is being written
                self._end += len(line)
                with contextlib.suppress(ValueError):
                    rows.append(self._kind.model_validate_json(line))
        return rows

    def advance(self) -> None:
        """Go on behind what was read."""
        self._begin = self._end


def cut(path: Path, last: int, *, several: bool = False) -> int:
    """Cut the file after its last whole row in order up to step `last`; that row's step, or 0.

    Args:
        several: a step may have many rows.
    """
    kept = end = 0
    with storage_errors(path.parent), contextlib.suppress(FileNotFoundError), path.open("r+b") as f:
        while line := f.readline(LONGEST_ROW):
            step = _step(line)
            in_order = kept <= step if several else kept < step
            if not (step and in_order and step <= last):
                f.truncate(end)
                os.fsync(f.fileno())
                break
            kept, end = step, end + len(line)
    return kept


def thin(path: Path) -> None:
    """Take every second step out of a file whose steps have many rows; the newest one stays.

    Raises:
        OSError: the file is as it was.
    """
    steps: list[int] = []  # in the order of the file
    with path.open("rb") as file:
        while line := file.readline(LONGEST_ROW):
            if (step := _step(line)) and (not steps or step != steps[-1]):
                steps.append(step)
    kept = set(steps[::-1][::2])
    thinner = path.with_suffix(".tmp")
    try:
        with path.open("rb") as file, thinner.open("wb") as copy:
            while line := file.readline(LONGEST_ROW):
                if _step(line) in kept:
                    copy.write(line)
        sync(thinner)
        thinner.replace(path)
    finally:
        thinner.unlink(missing_ok=True)


def _step(line: bytes) -> int:
    """The step of a row; 0 where it is torn."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return step if type(step) is int else 0
