"""Reading a checkpoint: nothing is believed that was not checked, and nothing is executed."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpcli.checkpoint.layout import (
    MANIFEST,
    MAX_DIMENSIONS,
    MAX_ENTRY_BYTES,
    MAX_FILES,
    MAX_HEADER_BYTES,
    MAX_HEADERS_BYTES,
    MAX_JSON_BYTES,
    SHARD,
    SHARDING_INFO,
    STATE,
    STEP,
    TENSORS,
    TYPES,
    VERSION,
    Checkpoint,
    Manifest,
    Place,
    completed,
    decode,
    discard,
    sha256,
    shard_name,
)
from mpcli.recipe.errors import Exit, Problem, UserError, user_error
from mpcli.rundir import storage_errors


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class _Block:
    """What one file has of a tensor: from where, and how much, per dimension."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Stored:
    """A tensor as the files have it; `dtype` is safetensors' name."""

    dtype: str
    shape: tuple[int, ...]
    blocks: list[_Block] = field(default_factory=list)


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of several files: each is put together when it is asked for, and not kept.

    Args:
        stored: how `folder` has them, which was verified.
    """

    def __init__(self, folder: Path, stored: Mapping[str, _Stored]) -> None:
        self._stored = stored
        names = {block.file for entry in stored.values() for block in entry.blocks}
        self._files: dict[str, Any] = {
            name: safe_open(folder / name, framework="pt") for name in names
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self._stored[name]
        # Each is mapped into memory.
        parts: list[Tensor] = [self._files[b.file].get_tensor(name) for b in entry.blocks]
        if len(parts) == 1:
            return parts[0]
        whole = parts[0].new_empty(entry.shape)
        for part, block in zip(parts, entry.blocks, strict=True):
            place = zip(block.offsets, block.sizes, strict=True)
            whole[tuple(slice(begin, begin + size) for begin, size in place)] = part
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def outline(self, name: str) -> Tensor:
        """A tensor without what is in it: on the device `meta`."""
        entry = self._stored[name]
        first: Tensor = self._files[entry.blocks[0].file].get_tensor(name)
        return first.new_empty(entry.shape, device="meta")


def outline(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Something of a tensor's shape and type, without reading what is divided among files."""
    return tensors.outline(name) if isinstance(tensors, ShardedTensors) else tensors[name]


def verify(checkpoint: Checkpoint) -> None:
    """Check that the folder is exactly what was saved: files of the sizes and hashes noted.

    Raises:
        UserError: exit 4, naming the first thing that is wrong.
    """
    with _damage_told(checkpoint):
        _examine(checkpoint)


def load(
    checkpoint: Checkpoint, *, hashes: bool = True
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Whole tensors (on the CPU) and state, after all of it was verified.

    Tensors of one file are mapped into memory; those of several are put together one by one, each
    time that they are asked for.

    Args:
        hashes: whether to compare them too; not where another process just did.

    Raises:
        UserError: exit 4, as `verify`.
    """
    with _damage_told(checkpoint):
        state, stored = _examine(checkpoint, hashes=hashes)
        if any(block.file != TENSORS for entry in stored.values() for block in entry.blocks):
            return ShardedTensors(checkpoint.path, stored), state
        return safetensors.torch.load_file(checkpoint.path / TENSORS), state


def newest_valid(
    folder: Path, use: Callable[[Checkpoint], None] = verify, up_to: float = math.inf
) -> tuple[Checkpoint | None, list[Problem]]:
    """The newest checkpoint that can be used, and a warning for each newer one that cannot.

    Cleans up what a killed `save` left: only the run's one writer may call this.

    Args:
        use: what has to succeed with it; UserError (exit 4) where it does not.
        up_to: the last step that counts.

    Returns:
        None where no checkpoint was ever completed.

    Raises:
        UserError: exit 4 where there are checkpoints and none is valid.
    """
    if folder.is_symlink():
        raise user_error(
            f"`{folder.name}` is a link, which is not followed",
            "move the folder itself into the run directory",
            exit_code=Exit.CHECKPOINT,
        )
    with storage_errors(folder, f"`{folder.name}`"):
        _recover(folder)
    damaged: list[str] = []
    for checkpoint in completed(folder):
        if checkpoint.step > up_to:
            continue
        try:
            use(checkpoint)
        except UserError as error:
            damaged += [problem.what for problem in error.problems]
            continue
        hint = f"{checkpoint.path.name} is used instead"
        return checkpoint, [Problem(what, hint, severity="warning") for what in damaged]
    if damaged:
        hint = f"bring `{folder.name}` back from a copy, or remove it to start from step 0"
        raise UserError(*(Problem(what, hint, exit_code=Exit.CHECKPOINT) for what in damaged))
    return None, []


def _recover(folder: Path) -> None:
    """Finish what a killed `save` had begun."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = STEP.fullmatch(path.name)
        if match and match[2] == ".old" and not os.path.lexists(path.with_suffix("")):
            path.replace(path.with_suffix(""))
        elif match and match[2]:
            discard(path)


@contextlib.contextmanager
def _damage_told(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (_Damaged, OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise user_error(
            f"checkpoint {checkpoint.path.name} cannot be used: {reason:.200}",
            exit_code=Exit.CHECKPOINT,
        ) from error


def _examine(
    checkpoint: Checkpoint, *, hashes: bool = True
) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Everything that can be wrong, the cheap things first.

    Returns:
        the state, and how the tensors are stored.
    """
    folder = checkpoint.path
    sizes = _files(folder)
    manifest = _manifest(folder / MANIFEST, checkpoint.step, files=len(sizes) - 2)
    if missing := manifest.files.keys() - sizes:
        raise _Damaged(f"{min(missing)} is missing")
    if foreign := sizes.keys() - manifest.files - {MANIFEST}:
        raise _Damaged(f"{min(foreign)} does not belong to it")
    for name, entry in manifest.files.items():
        if entry.size != sizes[name]:
            raise _Damaged(f"{name} has {sizes[name]} bytes instead of {entry.size}")
    if sizes[STATE] > MAX_JSON_BYTES:
        raise _Damaged(f"{STATE} is larger than {MAX_JSON_BYTES} bytes")
    # The headers tell how large the files must be: hashing terabytes of nothing takes hours.
    stored = _stored(folder, [name for name in manifest.files if name != STATE])
    for name, entry in manifest.files.items():
        if hashes and entry.sha256 != sha256(folder / name):
            raise _Damaged(f"{name} was changed: its SHA-256 is not the one in {MANIFEST}")
    return _state(folder / STATE), stored


def _files(folder: Path) -> dict[str, int]:
    """Sizes of the files in the folder, which are those of a checkpoint and nothing else."""
    for path in (folder.parent, folder):
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise _Damaged(f"`{path.name}` is not a folder")
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            # Names in messages are escaped: a stranger chose them.
            if entry.name not in (STATE, MANIFEST) and not SHARD.fullmatch(entry.name):
                raise _Damaged(f"{ascii(entry.name)[:80]} does not belong to it")
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise _Damaged(f"{entry.name} is not an ordinary file")
            sizes[entry.name] = status.st_size
    for name in (TENSORS, STATE, MANIFEST):
        if name not in sizes:
            raise _Damaged(f"{name} is missing")
    if len(sizes) - 2 > MAX_FILES:
        raise _Damaged(f"it has more than {MAX_FILES} files of tensors")
    return sizes


def _manifest(path: Path, step: int, files: int) -> Manifest:
    """The manifest.

    Args:
        files: of tensors, that there are: more of them make it longer.
    """
    value = _json(path, MAX_JSON_BYTES + (files - 1) * MAX_ENTRY_BYTES)
    try:
        manifest = Manifest.model_validate(value, strict=True)
    except ValidationError as error:
        raise _Damaged(f"{path.name} does not say what a manifest says") from error
    if manifest.version != VERSION:
        raise _Damaged(f"its format is version {manifest.version}; this program reads {VERSION}")
    if manifest.step != step:
        raise _Damaged(f"{path.name} is that of step {manifest.step}, not {step}")
    count = len(manifest.files) - 1
    if not count or manifest.files.keys() != {STATE, *map(shard_name, range(count))}:
        raise _Damaged(f"{path.name} names other files than those of a checkpoint")
    return manifest


def _state(path: Path) -> dict[str, Any]:
    value = _json(path)
    if not isinstance(value, dict):
        raise _Damaged(f"{path.name} is not an object")
    return value


def _json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    with path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise _Damaged(f"{path.name} is larger than {limit} bytes")
    try:
        return decode(text)
    except ValueError as error:
        raise _Damaged(f"{path.name}: {error}") from error


def _stored(folder: Path, names: list[str]) -> dict[str, _Stored]:
    """How the files, of which only headers are read, have the tensors: each one whole."""
    stored: dict[str, _Stored] = {}
    left = MAX_HEADERS_BYTES
    for name in names:
        left -= _header_bytes(folder / name)
        if left < 0:
            raise _Damaged(f"its files have headers of more than {MAX_HEADERS_BYTES} bytes")
        try:
            _add_blocks(folder / name, stored)
        except SafetensorError as error:
            raise _Damaged(f"{name}: {error}") from error
    for name, entry in stored.items():
        if not _is_complete(entry):
            raise _Damaged(f"the parts of {ascii(name)[:80]} are not the whole of it")
    return stored


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise _Damaged(f"{path.name} has a header of {size} bytes")
    return size


def _add_blocks(path: Path, stored: dict[str, _Stored]) -> None:
    """What a file has of each tensor, as its header says."""
    # Opening it refuses overlaps, gaps, and what is not a header. It may be too large to be mapped.
    with safe_open(path, framework="pt", backend="pread") as tensors:
        names = tensors.keys()
        places = _places(path, tensors.metadata() or {}, set(names))
        for name in names:
            part = tensors.get_slice(name)
            dtype, sizes = part.get_dtype(), tuple(part.get_shape())
            if dtype not in TYPES:
                raise _Damaged(f"{path.name} has tensors of type {dtype}")
            block = _Block(path.name, places[name].saved_offsets, sizes)
            shape = places[name].shape
            entry = stored.setdefault(name, _Stored(dtype, sizes if shape is None else shape))
            if (dtype, sizes if shape is None else shape) != (entry.dtype, entry.shape):
                raise _Damaged(f"{path.name} has a part of another {ascii(name)[:80]}")
            if not len(block.offsets) == len(sizes) == len(entry.shape) <= MAX_DIMENSIONS:
                raise _Damaged(f"{path.name} has no place for {ascii(name)[:80]}")
            entry.blocks.append(block)


def _places(path: Path, metadata: dict[str, str], names: set[str]) -> dict[str, Place]:
    text = metadata.get(SHARDING_INFO, "")
    try:
        # A place is an object of two lists; millions of them would take gigabytes.
        if _brackets(text) > 1 + 3 * len(names) + sum(map(_brackets, names)):
            raise ValueError("more than places")
        values = from_json(text)
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError("those of other tensors")
        return {name: Place.model_validate(value) for name, value in values.items()}
    except ValueError as error:  # as a ValidationError is
        raise _Damaged(f"{path.name} does not say where its tensors belong") from error


def _brackets(text: str) -> int:
    return text.count("[") + text.count("{")


def _is_complete(entry: _Stored) -> bool:
    """Whether the blocks have every element once."""
    first = entry.blocks[0]
    if len(entry.blocks) == 1:
        return first.sizes == entry.shape and not any(first.offsets)
    return _tiles([(block.offsets, block.sizes) for block in entry.blocks], entry.shape)


def _tiles(blocks: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    """Whether blocks lie side by side and fill a shape, as chunks of chunks along dimensions do."""
    if not shape:
        return len(blocks) == 1
    slabs: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for offsets, sizes in blocks:
        slabs.setdefault((offsets[0], sizes[0]), []).append((offsets[1:], sizes[1:]))
    end = 0
    for (begin, size), inside in sorted(slabs.items()):
        if begin != end or not size or not _tiles(inside, shape[1:]):
            return False
        end += size
    return end == shape[0]
