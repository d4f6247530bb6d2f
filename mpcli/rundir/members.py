"""What each of several processes tells of itself, in files of its own in the attempt's folder."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Literal, TypeVar

from mpcli.records import Heartbeat, RankFailure, Record, strict_json

Told = TypeVar("Told", bound=Record)

_LONGEST = 2**16


class Pulse:
    """The file that says which step a rank is in, rewritten in place at every step.

    One `pwrite` of a fixed width: what is read is whole at any moment, and nothing is synced.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        about = {
            "rank": rank,
            "pid": os.getpid(),
            "launcher": os.getppid(),
            "host": socket.gethostname(),
        }
        self._begin = strict_json(about)[:-1]
        self._step = 0
        path = folder / f"rank{rank}.json"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.beat(0)

    def beat(self, step: int, state: Literal["running", "ended"] = "running") -> None:
        """Say that a step begins."""
        self._step = step
        line = f'{self._begin}, "step": {step:<12}, "state": "{state}"'
        os.pwrite(self._file, f"{line:<{len(self._begin) + 50}}}}\n".encode(), 0)

    def end(self) -> None:
        """Say that the rank ended as all did."""
        self.beat(self._step, "ended")


def write_failure(folder: Path, failure: RankFailure) -> None:
    """Write it at once or not at all."""
    path = folder / f"failure.rank{failure.rank}.json"
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(failure.to_json(indent=2) + "\n", "utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def heartbeats(folder: Path, ranks: Collection[int] | None = None) -> dict[int, Heartbeat]:
    """What ranks of an attempt say of themselves, by rank; by default all of them."""
    if ranks is None:
        return _told(folder, r"rank([0-9]{1,9})\.json", Heartbeat)
    read = {rank: _read(folder / f"rank{rank}.json", Heartbeat) for rank in ranks}
    return {rank: beat for rank, beat in read.items() if beat}


def failures(folder: Path) -> dict[int, RankFailure]:
    """How ranks of an attempt ended by themselves, by rank."""
    return _told(folder, r"failure\.rank([0-9]{1,9})\.json", RankFailure)


def _told(folder: Path, pattern: str, kind: type[Told]) -> dict[int, Told]:
    found = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(pattern, path.name)
        if match and (told := _read(path, kind)):
            found[int(match[1])] = told
    return found


def _read(path: Path, kind: type[Told]) -> Told | None:
    try:
        with path.open("rb") as file:
            return kind.model_validate_json(file.read(_LONGEST))
    except (OSError, ValueError):
        return None
