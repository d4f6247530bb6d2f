"""Writing a checkpoint: durably, all of it or nothing.

The tensor files are laid out as `torch.distributed.checkpoint`'s HuggingFaceStorageWriter does it,
so that its reader can load them into any number of processes. The writer itself is not used: for
one process it takes several times as long, holds every tensor three times, and swallows Ctrl-C; for
several, a save in a thread would need collectives there. Here the ranks meet through files: each
leaves beside its tensors an entry of the manifest, which rank 0 waits for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mpcli.checkpoint.layout import (
    MANIFEST,
    MAX_JSON_BYTES,
    SHARDING_INFO,
    STATE,
    TENSORS,
    VERSION,
    Checkpoint,
    FileEntry,
    Manifest,
    Part,
    completed,
    decode,
    discard,
    encode,
    parts_of,
    sha256,
    shard_name,
)
from mpcli.recipe.errors import Exit, user_error
from mpcli.rundir import storage_errors, sync

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor | Part],
    state: Mapping[str, Any],
    *,
    keep_last: int,
    keep: Collection[int] = (),
    writers: int = 1,
    patience: float = 600.0,
    lost: threading.Event | None = None,
) -> Checkpoint:
    """Write `folder/step-<step>`, then remove what is no longer wanted.

    The checkpoint is on the disk when this returns. Killed, or out of space, at any moment, this
    leaves every checkpoint that there was before. Later steps go too: whoever saves an earlier
    one has given them up.

    Args:
        folder: `checkpoints` of a run; made if its parent exists.
        tensors: on any device, of any layout; tensors that share memory are written one by one.
        state: JSON values; tuples come back as lists, NaN and infinities as the names that
            `float()` understands.
        keep_last: how many of the newest stay, this one included.
        keep: steps that stay besides.
        writers: ranks that have parts. If there are several, this is rank 0, `begin` was called
            before any of them wrote, and each of the others calls `save_share`.
        patience: seconds that it waits for their files when its own are written.
        lost: set when the others can write no more: nothing is waited for from then on.

    Raises:
        UserError: exit 7, nothing was saved; 6, a rank does not write.
        TypeError, ValueError: `state` is not JSON, or more than `MAX_JSON_BYTES`.
    """
    text = encode(dict(state))
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text)} bytes of state: what is large belongs in a tensor")
    decode(text)  # what could not be read must not be written
    temporary = begin(folder, step) if writers == 1 else _temporary(folder, step)
    final = temporary.with_suffix("")
    with storage_errors(folder, f"checkpoint {final.name}"):
        try:
            _write(temporary, step, tensors, text, writers, patience, lost)
            _publish(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                discard(temporary)
            raise
    _remove_unwanted(folder, step, keep_last, keep)
    return Checkpoint(final, step)


def begin(folder: Path, step: int) -> Path:
    """Make the empty folder that `folder/step-<step>` is written in.

    Raises:
        UserError: exit 7, it cannot be made.
    """
    temporary = _temporary(folder, step)
    with storage_errors(folder, f"checkpoint step-{step}"):
        make_folder(folder)
        discard(temporary)
        temporary.mkdir()
    return temporary


def save_share(
    folder: Path, step: int, tensors: Mapping[str, Tensor | Part], rank: int
) -> Checkpoint:
    """Write the parts that a rank other than 0 holds; rank 0's `save` does the rest.

    Raises:
        UserError: exit 7, they cannot be written.
    """
    temporary = _temporary(folder, step)
    path, entry = temporary / shard_name(rank), _entry_path(temporary, rank)
    with storage_errors(folder, f"checkpoint step-{step}"):
        try:
            _write_tensors(path, parts_of(tensors, rank))
            sync(path)
            written = entry.with_suffix(".tmp")
            written.write_bytes(encode(_file_entry(path).model_dump()))
            written.replace(entry)
        except BaseException:
            with contextlib.suppress(OSError):  # rank 0 need not wait for it
                entry.touch()
            raise
    return Checkpoint(temporary.with_suffix(""), step)


def _temporary(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.tmp"


def _entry_path(temporary: Path, rank: int) -> Path:
    """Where a rank says what it wrote; empty, if it failed to."""
    return temporary / f"entry-{rank:05}.json"


def make_folder(folder: Path) -> None:
    """Make `checkpoints`, durably; a link in its place is refused."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, f"`{folder.name}` is a link, which is not followed")
    if not folder.is_dir():
        folder.mkdir()
        sync(folder.parent)


def _write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor | Part],
    state: bytes,
    writers: int,
    patience: float,
    lost: threading.Event | None,
) -> None:
    """Rank 0's three files and their way to the disk, where the other ranks' files are already."""
    _write_tensors(folder / TENSORS, parts_of(tensors, 0))
    (folder / STATE).write_bytes(state)
    entries = {path.name: _file_entry(path) for path in (folder / TENSORS, folder / STATE)}
    entries |= _collected(folder, writers, patience, lost)
    manifest = Manifest(version=VERSION, step=step, files=entries)
    (folder / MANIFEST).write_bytes(encode(manifest.model_dump()))
    for path in (folder / TENSORS, folder / STATE, folder / MANIFEST, folder):
        sync(path)


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(size=path.stat().st_size, sha256=sha256(path))


def _collected(
    folder: Path, writers: int, patience: float, lost: threading.Event | None
) -> dict[str, FileEntry]:
    """What the other ranks wrote. A rank that died says nothing, but its group is lost then."""
    entries = {}
    lost = lost or threading.Event()
    deadline = time.monotonic() + patience
    for rank in range(1, writers):
        path = _entry_path(folder, rank)
        while not path.exists():
            if lost.is_set() or time.monotonic() > deadline:
                raise user_error(
                    f"rank {rank} has not written its part of checkpoint {folder.stem}",
                    "it hangs, or does not share a disk with rank 0",
                    exit_code=Exit.DISTRIBUTED,
                )
            time.sleep(_POLL_SECONDS)
        text = path.read_bytes()
        if not text:
            what = f"rank {rank} cannot write its part of checkpoint {folder.stem}"
            # Which the other rank tells of: this one has lost it.
            raise user_error(what, f"rank {rank} says why", exit_code=Exit.DISTRIBUTED)
        entries[shard_name(rank)] = FileEntry.model_validate_json(text)
        path.unlink()
    return entries


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, none of which shares memory with another."""
    host: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        host[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return host


def _write_tensors(path: Path, parts: Mapping[str, Part]) -> None:
    tensors = _on_host({name: part.tensor for name, part in parts.items()})
    places = {name: part.place.model_dump(exclude_none=True) for name, part in parts.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", SHARDING_INFO: json.dumps(places)}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:  # what its writer makes of an OSError
        number = _OS_ERROR.search(str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error


def _publish(temporary: Path, final: Path) -> None:
    """Give a synced folder its name. What has the name now stays until this one is there."""
    old = final.with_suffix(".old")
    if os.path.lexists(final):
        discard(old)
        final.replace(old)
    temporary.replace(final)
    sync(final.parent)
    discard(old)


def _remove_unwanted(folder: Path, step: int, keep_last: int, keep: Collection[int]) -> None:
    present = completed(folder)
    newest = [checkpoint.step for checkpoint in present if checkpoint.step <= step][:keep_last]
    for checkpoint in present:
        if checkpoint.step not in {step, *newest, *keep}:
            try:
                # Half removed, it must not look like a checkpoint.
                removing = checkpoint.path.with_suffix(".tmp")
                discard(removing)
                discard(checkpoint.path.replace(removing))
            except OSError as error:
                name = checkpoint.path.name
                logger.warning("checkpoint %s cannot be removed: %s", name, error.strerror)
