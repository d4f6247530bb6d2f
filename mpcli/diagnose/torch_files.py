"""Files of `torch.save`: a pickle is read as data, and what it asks for beside data is refused.

`torch.load(weights_only=True)` executes nothing. It may be made to work and to allocate for a long
time, though; so the pickle is looked through before, without running it, and only storages,
tensors and containers may be asked for.
"""

from __future__ import annotations

import itertools
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from mpcli.diagnose.reading import bounded_memory, size_of, unreadable

MAX_OPERATIONS = 2**21  # of a pickle: about 50,000 tensors
_LEGACY_PICKLES = 5  # magic number, version, system, the value, names of the storages
_DATA = {"collections OrderedDict", "collections Counter", "__builtin__ set", "builtins set",
         "__builtin__ complex", "builtins complex"}  # fmt: skip


class _Refused(Exception):
    """Why a file is not read."""


def load(path: Path) -> Any:
    """The value in a file of `torch.save`, with its tensors mapped from the file where possible.

    Raises:
        UserError: exit 4.
    """
    size = size_of(path)
    try:
        with bounded_memory(size), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapped = zipfile.is_zipfile(path)
            if mapped:
                _check_archive(path, size)
            else:  # of torch before 1.6
                with path.open("rb") as file:
                    for _ in range(_LEGACY_PICKLES):
                        _check_pickle(file)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _Refused as error:
        raise unreadable(path, str(error)) from error
    except MemoryError as error:
        raise unreadable(path, "it needs more memory than a file of its size may") from error
    except pickle.UnpicklingError as error:
        # Its own words are advice for programmers, with escapes for a terminal.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = _is_code(asked[1]) if asked else "its pickle is damaged"
        raise unreadable(path, why) from error
    except Exception as error:  # a damaged file can end in any of torch's and Python's errors
        lines = str(error).splitlines() or [type(error).__name__]
        raise unreadable(path, lines[0]) from error


def _check_archive(path: Path, size: int) -> None:
    """Stored, not compressed; nothing twice; and a pickle that asks for data only."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise _Refused("it is a TorchScript program, which is code and not data")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _Refused("its archive is compressed")
        if len({name.casefold() for name in names}) < len(names):
            raise _Refused("its archive has a file twice")
        if sum(entry.file_size for entry in entries) > size:
            raise _Refused("its archive holds more than the file")
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("it is not a file of `torch.save`")
        with archive.open(pickles[0]) as file:
            _check_pickle(file)


def _is_code(name: str) -> str:
    return f"it asks for `{name:.80}`, which is code and not data"


def _check_pickle(file: IO[bytes]) -> None:
    """Look through one pickle, up to its end, without doing what it says."""
    count = 0
    for operation, argument, _ in itertools.islice(pickletools.genops(file), MAX_OPERATIONS):
        count += 1
        if operation.name in ("GLOBAL", "INST"):
            if argument not in _DATA and not str(argument).startswith("torch"):
                asked = str(argument).replace(" ", ".")
                raise _Refused(_is_code(asked))
        elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise _Refused("it asks for Python objects in a way that `torch.save` does not")
    if count == MAX_OPERATIONS:
        raise _Refused("its pickle is too long")
