"""Reading a checkpoint: nothing is believed that was not checked, and nothing is executed."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpcli.checkpoint.layout import (
    MANIFEST,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    STATE,
    STEP,
    TENSORS,
    TYPES,
    VERSION,
    Checkpoint,
    Manifest,
    completed,
    decode,
    discard,
    sha256,
)
from mpcli.recipe.errors import Exit, Problem, UserError, user_error
from mpcli.rundir import storage_errors


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


def verify(checkpoint: Checkpoint) -> None:
    """Check that the folder is exactly what was saved: three files of the sizes and hashes noted.

    Raises:
        UserError: exit 4, naming the first thing that is wrong.
    """
    with _damage_told(checkpoint):
        _examine(checkpoint)


def load(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state, after all of it was verified.

    Raises:
        UserError: exit 4, as `verify`.
    """
    with _damage_told(checkpoint):
        state = _examine(checkpoint)
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


def _examine(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that can be wrong, the cheap things first.

    Returns:
        the state.
    """
    folder = checkpoint.path
    sizes = _files(folder)
    manifest = _manifest(folder / MANIFEST, checkpoint.step)
    for name, entry in manifest.files.items():
        if entry.size != sizes[name]:
            raise _Damaged(f"{name} has {sizes[name]} bytes instead of {entry.size}")
    if sizes[STATE] > MAX_JSON_BYTES:
        raise _Damaged(f"{STATE} is larger than {MAX_JSON_BYTES} bytes")
    _check_header(folder / TENSORS)  # and so the size: hashing terabytes of nothing takes hours
    for name, entry in manifest.files.items():
        if entry.sha256 != sha256(folder / name):
            raise _Damaged(f"{name} was changed: its SHA-256 is not the one in {MANIFEST}")
    return _state(folder / STATE)


def _files(folder: Path) -> dict[str, int]:
    """Sizes of the files in the folder, which are those of a checkpoint and nothing else."""
    for path in (folder.parent, folder):
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise _Damaged(f"`{path.name}` is not a folder")
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, 10):
            # Names in messages are escaped: a stranger chose them.
            if entry.name not in (TENSORS, STATE, MANIFEST):
                raise _Damaged(f"{ascii(entry.name)[:80]} does not belong to it")
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise _Damaged(f"{entry.name} is not an ordinary file")
            sizes[entry.name] = status.st_size
    for name in (TENSORS, STATE, MANIFEST):
        if name not in sizes:
            raise _Damaged(f"{name} is missing")
    return sizes


def _manifest(path: Path, step: int) -> Manifest:
    value = _json(path)
    try:
        manifest = Manifest.model_validate(value, strict=True)
    except ValidationError as error:
        raise _Damaged(f"{path.name} does not say what a manifest says") from error
    if manifest.version != VERSION:
        raise _Damaged(f"its format is version {manifest.version}; this program reads {VERSION}")
    if manifest.step != step:
        raise _Damaged(f"{path.name} is that of step {manifest.step}, not {step}")
    if manifest.files.keys() != {TENSORS, STATE}:
        raise _Damaged(f"{path.name} names other files than those of a checkpoint")
    return manifest


def _state(path: Path) -> dict[str, Any]:
    value = _json(path)
    if not isinstance(value, dict):
        raise _Damaged(f"{path.name} is not an object")
    return value


def _json(path: Path) -> Any:
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise _Damaged(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        return decode(text)
    except ValueError as error:
        raise _Damaged(f"{path.name}: {error}") from error


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise _Damaged(f"{path.name} has a header of {size} bytes")
    try:
        # Opening it refuses overlaps, gaps, and what is not a header.
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()
            types = {tensors.get_slice(name).get_dtype() for name in names}
    except SafetensorError as error:
        raise _Damaged(f"{path.name}: {error}") from error
    if not types <= TYPES:
        raise _Damaged(f"{path.name} has tensors of type {min(types - TYPES)}")
