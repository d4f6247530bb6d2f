"""Writing a checkpoint: durably, all of it or nothing.

The tensor file is laid out as `torch.distributed.checkpoint`'s HuggingFaceStorageWriter does it, so
that its reader can load it into any number of processes. The writer itself is not used: for one
process it takes several times as long, holds every tensor three times, and swallows Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mpcli.checkpoint.layout import (
    MANIFEST,
    MAX_JSON_BYTES,
    STATE,
    TENSORS,
    VERSION,
    Checkpoint,
    FileEntry,
    Manifest,
    completed,
    decode,
    discard,
    encode,
    sha256,
)
from mpcli.rundir import storage_errors, sync

logger = logging.getLogger(__name__)

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep_last: int,
    keep: Collection[int] = (),
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

    Raises:
        UserError: exit 7, nothing was saved.
        TypeError, ValueError: `state` is not JSON, or more than `MAX_JSON_BYTES`.
    """
    text = encode(dict(state))
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text)} bytes of state: what is large belongs in a tensor")
    decode(text)  # what could not be read must not be written
    final = folder / f"step-{step}"
    temporary = final.with_suffix(".tmp")
    with storage_errors(folder, f"checkpoint {final.name}"):
        make_folder(folder)
        discard(temporary)
        temporary.mkdir()
        try:
            _write(temporary, step, tensors, text)
            _publish(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                discard(temporary)
            raise
    _remove_unwanted(folder, step, keep_last, keep)
    return Checkpoint(final, step)


def make_folder(folder: Path) -> None:
    """Make `checkpoints`, durably; a link in its place is refused."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, f"`{folder.name}` is a link, which is not followed")
    if not folder.is_dir():
        folder.mkdir()
        sync(folder.parent)


def _write(folder: Path, step: int, tensors: Mapping[str, Tensor], state: bytes) -> None:
    """The three files, and their way to the disk."""
    _write_tensors(folder / TENSORS, _on_host(tensors))
    (folder / STATE).write_bytes(state)
    entries = {
        path.name: FileEntry(size=path.stat().st_size, sha256=sha256(path))
        for path in (folder / TENSORS, folder / STATE)
    }
    manifest = Manifest(version=VERSION, step=step, files=entries)
    (folder / MANIFEST).write_bytes(encode(manifest.model_dump()))
    for path in (folder / TENSORS, folder / STATE, folder / MANIFEST, folder):
        sync(path)


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


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(whole)}
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
