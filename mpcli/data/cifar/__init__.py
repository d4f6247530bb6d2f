"""CIFAR-10 and CIFAR-100: found in a folder in one of three layouts, or downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mpcli.data.cache import content_key, expand
from mpcli.data.cifar import binary, parquet, python_batches
from mpcli.data.cifar.archive import download, download_dir
from mpcli.data.cifar.spec import CHANNELS, CIFAR10, CIFAR100, SIZE, Cifar, Files, Layout
from mpcli.data.images import ImageInfo, Splits, stored_splits, write_split
from mpcli.data.store import Writer, stored
from mpcli.recipe.data import Cifar10, Cifar100
from mpcli.recipe.errors import Exit, UserError, user_error

SPECS: dict[str, Cifar] = {"cifar10": CIFAR10, "cifar100": CIFAR100}
LAYOUTS: dict[str, Layout] = {
    "parquet": parquet,
    "python batches": python_batches,
    "binary version": binary,
}


class Found(NamedTuple):
    """A data set on disk."""

    folder: Path
    layout_name: str
    files: Files

    @property
    def layout(self) -> Layout:
        """The functions that read it."""
        return LAYOUTS[self.layout_name]


def describe(data: Cifar10 | Cifar100) -> ImageInfo:
    """Sizes from metadata; those of the published set when it has yet to be downloaded."""
    with _readable():
        return _info(SPECS[data.kind], locate(data))


def load(data: Cifar10 | Cifar100) -> tuple[Splits, ImageInfo]:
    """Both splits, decoded once and memory-mapped from then on."""
    cifar = SPECS[data.kind]
    with _readable():
        found = locate(data) or _download(cifar)
        info = _info(cifar, found)
        layout, files = found.layout, found.files
        key = content_key(f"{cifar.kind} {len(files.train)}", (*files.train, *files.eval))

        def decode(writer: Writer) -> dict[str, Any]:
            write_split(writer, "train", layout.read(files.train, cifar))
            write_split(writer, "eval", layout.read(files.eval, cifar))
            return {}

        arrays, _ = stored(key, decode)
    return stored_splits(arrays), info


def _info(cifar: Cifar, found: Found | None) -> ImageInfo:
    if found is None:
        num_train, num_eval = cifar.num_train, cifar.num_eval
        places = " or ".join(map(str, _default_folders(cifar)))
        source = f"{cifar.title} by download (it is not in {places})"
    else:
        num_train, num_eval = found.layout.count(found.files, cifar)
        source = f"{found.folder} ({found.layout_name})"
    return ImageInfo(
        num_train=num_train,
        num_eval=num_eval,
        input_shape=(CHANNELS, SIZE, SIZE),
        num_classes=cifar.num_classes,
        source=source,
        classes=cifar.classes,
    )


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise user_error(what, path="data", exit_code=Exit.ENVIRONMENT) from error


def locate(data: Cifar10 | Cifar100) -> Found | None:
    """Where the data set is, or None when it would have to be downloaded.

    Raises:
        UserError: exit 3, the folder that should hold the data set does not.
    """
    cifar = SPECS[data.kind]
    if data.path is not None:
        return _in(expand(data.path), cifar)
    for folder in _default_folders(cifar):
        if folder.exists():
            return _in(folder, cifar)
    return None


def _default_folders(cifar: Cifar) -> list[Path]:
    root = os.environ.get("MPTRAIN_DATA")
    given = [expand(root) / cifar.kind] if root else []
    return [*given, download_dir(cifar)]


def _in(folder: Path, cifar: Cifar) -> Found:
    for name, layout in LAYOUTS.items():
        files = layout.find(folder, cifar)
        if files:
            return Found(folder, name, files)
    if not folder.is_dir():
        what = f"no folder {folder}"
    else:
        names = sorted(path.name for path in folder.iterdir())
        holds = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
        what = f"no whole {cifar.title} in {folder}; it holds {holds}"
    raise user_error(
        what,
        "it should hold `train.parquet` and `test.parquet` (or their shards), "
        f"`{cifar.python_folder}`, or `{cifar.binary_folder}`",
        path="data.path",
        exit_code=Exit.ENVIRONMENT,
    )


def _download(cifar: Cifar) -> Found:
    try:
        download(cifar)
    except (OSError, RuntimeError) as error:
        raise _nowhere(cifar, error) from error
    return _in(download_dir(cifar), cifar)


def _nowhere(cifar: Cifar, error: Exception) -> UserError:
    tried = [str(folder) for folder in _default_folders(cifar)]
    if "MPTRAIN_DATA" not in os.environ:
        tried.insert(0, f"$MPTRAIN_DATA/{cifar.kind} (not set)")
    return user_error(
        f"{cifar.title} is in none of {', '.join(tried)}, and the download failed: {error}",
        "name a folder that holds it with `--set data.path=FOLDER`; or put it into "
        f"FOLDER/{cifar.kind} and set MPTRAIN_DATA=FOLDER; or run once on a machine with a "
        f"network and copy {download_dir(cifar)} from there",
        path="data",
        exit_code=Exit.ENVIRONMENT,
    )
