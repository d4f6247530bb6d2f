"""Names, limits and texts of a checkpoint: what its writer and its reader agree on."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import from_json
from torch import Size, Tensor

from mpcli.records import Record, strict_json

VERSION = 1
MAX_FILES = 2**14  # of tensors: each is mapped, and Linux maps 65,530 for a process
STATE = "state.json"
MANIFEST = "manifest.json"
SHARDING_INFO = "DCP_SHARDING_INFO"  # in the metadata of a safetensors file
MAX_JSON_BYTES = 2**18
MAX_ENTRY_BYTES = 2**9  # of a file of tensors in the manifest
MAX_HEADER_BYTES = 2**23  # of a safetensors file: about 40,000 tensors
MAX_HEADERS_BYTES = 2**28  # of all of them
MAX_DIMENSIONS = 64  # torch has no more
TYPES = frozenset((  # of safetensors, that torch has too
    "BOOL", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64",
    "C64", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ",
))  # fmt: skip

STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})(\.tmp|\.old)?")
SHARD = re.compile(r"shard-[0-9]{5}-model-00001-of-00001\.safetensors")


def shard_name(rank: int) -> str:
    """The file of a rank's tensors, as torch's HuggingFaceStorageWriter names it."""
    return f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"


TENSORS = shard_name(0)


@dataclass(frozen=True)
class Part:
    """A block of a tensor that is divided among ranks.

    Attributes:
        tensor: what this rank holds; it may be empty.
        offsets: where it begins in the whole, per dimension.
        shape: of the whole.
    """

    tensor: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Part:
        """All of a tensor."""
        return cls(tensor, (0,) * tensor.dim(), tuple(tensor.shape))

    @property
    def place(self) -> Place:
        """What the file that it is in says about it."""
        is_whole = tuple(self.tensor.shape) == self.shape
        return Place(saved_offsets=self.offsets, shape=None if is_whole else self.shape)

    @property
    def whole_bytes(self) -> int:
        """Of the whole tensor."""
        return self.tensor.element_size() * Size(self.shape).numel()


def parts_of(tensors: Mapping[str, Tensor | Part], rank: int) -> dict[str, Part]:
    """What a rank writes of its tensors: its parts, and in rank 0 what is whole as well."""
    parts: dict[str, Part] = {}
    for name, value in tensors.items():
        if isinstance(value, Part) and Size(value.shape).numel():
            if value.tensor.numel():
                parts[name] = value
        elif rank == 0:  # nothing cannot be divided either
            whole = value.tensor.new_empty(value.shape) if isinstance(value, Part) else value
            parts[name] = Part.whole(whole)
    return parts


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoints/step-<N>`, holding the state after N attempted steps."""

    path: Path
    step: int


_Length = Annotated[int, Field(strict=True, ge=0)]
_Lengths = Annotated[tuple[_Length, ...], Field(fail_fast=True)]


class Place(Record):
    """Of a tensor in a file: an entry of `DCP_SHARDING_INFO`, which torch's reader knows.

    Attributes:
        saved_offsets: where it begins in the whole.
        shape: of the whole, where the file has not all of it; ours, torch's reader passes it over.
    """

    saved_offsets: _Lengths
    shape: _Lengths | None = None


class FileEntry(Record):
    """What a file was when it was written."""

    size: int
    sha256: str


class Manifest(Record):
    """`manifest.json`."""

    version: int
    step: int
    files: dict[str, FileEntry]


def encode(value: Mapping[str, Any]) -> bytes:
    """The one text that a JSON value has in a checkpoint."""
    return (strict_json(value, indent=2) + "\n").encode()


def decode(text: bytes) -> Any:
    """The value of a text made by `encode`; every other text is refused.

    Raises:
        ValueError: also for what is nested more than 200 deep.
    """
    value = from_json(text, allow_inf_nan=False)
    if encode(value) != text:
        raise ValueError("not written by this program")
    return value


def sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def completed(folder: Path) -> list[Checkpoint]:
    """Everything that has a checkpoint's name, newest first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [match for name in names if (match := STEP.fullmatch(name)) and not match[2]]
    checkpoints = [Checkpoint(folder / match[0], int(match[1])) for match in found]
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step, reverse=True)


def discard(path: Path) -> None:
    """Remove a file, a link or a folder; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
