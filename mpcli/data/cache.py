"""Decoded images on disk, so that a data set is decoded once."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mpcli.data.images import Split, Splits

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """`$MPTRAIN_CACHE`, or `~/.cache/mptrain`."""
    return expand(os.environ.get("MPTRAIN_CACHE") or "~/.cache/mptrain")


def expand(path: str) -> Path:
    """A path with `~` resolved where there is such a home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111, pathlib's raises where there is none


def content_key(name: str, files: Iterable[Path]) -> str:
    """A key that changes with the content and the order of the files, not with their names."""
    key = hashlib.sha256(name.encode())
    for path in files:
        with path.open("rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    return key.hexdigest()


def cached(key: str, decode: Callable[[], Splits]) -> Splits:
    """The splits stored under a key; decoded and stored when they are not, or not intact.

    A cache that cannot be written costs a warning and the time to decode again, nothing else.
    """
    path = cache_dir() / "decoded" / f"{key}.safetensors"
    splits = _load(path)
    if splits is None:
        splits = decode()
        try:
            _store(splits, path)
        except (OSError, SafetensorError) as error:
            _log.warning("decoded images are not cached: %s", error)
    return splits


def _load(path: Path) -> Splits | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            splits = Splits(
                Split(file.get_tensor("train.images"), file.get_tensor("train.labels")),
                Split(file.get_tensor("eval.images"), file.get_tensor("eval.labels")),
            )
            intact = (file.metadata() or {}).get("sha256") == _digest(splits)
    except (OSError, SafetensorError) as error:
        _log.warning("%s is damaged and made again: %s", path, error)
        return None
    if not intact:
        _log.warning("%s is damaged and made again", path)
        return None
    return splits


def _store(splits: Splits, path: Path) -> None:
    tensors = {
        f"{name}.{field}": tensor
        for name, split in splits._asdict().items()
        for field, tensor in split._asdict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"sha256": _digest(splits)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(splits: Splits) -> str:
    digest = hashlib.sha256()
    for tensor in (*splits.train, *splits.eval):
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
