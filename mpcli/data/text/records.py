"""What text comes in: records of one of two splits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from mpcli.recipe.errors import Exit, UserError, user_error

_log = logging.getLogger(__name__)

Split = Literal["train", "eval"]


class Record(NamedTuple):
    """One example, or a part of a document.

    Attributes:
        texts: one, or two that are compared.
        label: from 0, the number of its class; -1 where none is asked for.
        ends: whether a document ends with it.
    """

    texts: tuple[str, ...]
    label: int = -1
    ends: bool = True


@dataclass
class Damage:
    """What becomes of records that cannot be decoded.

    Attributes:
        skipped: how many so far.
        first: where the first of them is, and what is wrong with it.
    """

    on_error: Literal["stop", "skip"]
    skipped: int = 0
    first: str = ""

    def add(self, file: object, record: str, what: str) -> None:
        """Count a record.

        Raises:
            UserError: exit 3, with the file and the record, unless they are skipped.
        """
        described = f"{file}: {record}: {what}"
        if self.on_error == "stop":
            raise no_data(described, "mend it, or leave such records out: `data.on_error: skip`")
        self.first = self.first or described
        self.skipped += 1


@dataclass(frozen=True)
class Source:
    """Both splits of a data set.

    Attributes:
        files: whose content determines the records, by split.
        about: where they come from, in words.
        read: the records of a split, in order. UserError (exit 3) where a file is damaged.
        label_names: reads them, in the order of their numbers; none where labels are numbers.
    """

    files: dict[Split, tuple[Path, ...]]
    about: str
    read: Callable[[Split, Damage], Iterator[Record]]
    label_names: Callable[[], tuple[str, ...]] = tuple


def warn_of_shared(files: dict[Split, tuple[Path, ...]]) -> None:
    """Warn of files that are in both splits; of all files it was meant so."""
    if files["train"] == files["eval"]:
        return
    known = {path.resolve() for path in files["train"]}
    if shared := [path for path in files["eval"] if path.resolve() in known]:
        _log.warning(
            "%s is both learnt from and held out: evaluations say nothing of new text", shared[0]
        )


def no_data(what: str, hint: str | None = None, path: str = "data") -> UserError:
    """Data is missing or damaged: exit 3."""
    return user_error(what, hint, path=path, exit_code=Exit.ENVIRONMENT)
