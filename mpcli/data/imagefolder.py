"""Images in folders named after their classes: `train/<class>/*` and `val/<class>/*`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mpcli.data.cache import content_key
from mpcli.data.images import ImageInfo, Split, Splits, stored_splits, write_split
from mpcli.data.store import Writer, stored
from mpcli.recipe.data import ImageFolder
from mpcli.recipe.errors import Exit, UserError, one_of, user_error

EVAL_FOLDERS = ("val", "validation", "test")  # the first that is there
_FORMAT = 2  # of the cache: another number when the same files give other arrays
_FORMATS = ("PNG", "JPEG")  # some of the others run external programs
_CHUNK = 512  # images that are decoded together, in threads
_SHOWN = 5  # files named of those that are skipped

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """The files of both splits by class, whatever is in them."""

    classes: tuple[str, ...]
    train: tuple[tuple[Path, int], ...]  # file and number of its class
    eval: tuple[tuple[Path, int], ...]
    eval_folder: str


def describe(data: ImageFolder) -> ImageInfo:
    """Counts of files; of images, where files may be skipped: then all are read."""
    if data.on_error == "skip":
        return load(data)[1]
    found = _found(data)
    return _info(data, found, len(found.train), len(found.eval))


def load(data: ImageFolder) -> tuple[Splits, ImageInfo]:
    """Both splits, decoded once and memory-mapped from then on.

    Raises:
        UserError: exit 3, there is no such folder, or a file is no image, which is named.
    """
    found = _found(data)
    with _readable(data):
        labels = [[label for _, label in split] for split in (found.train, found.eval)]
        files = [path for path, _ in (*found.train, *found.eval)]
        key = content_key(f"imagefolder {_FORMAT} {data.size} {labels} {data.on_error}", files)

        def decode(writer: Writer) -> dict[str, Any]:
            bad = [
                *_write(writer, "train", data, found.train),
                *_write(writer, "eval", data, found.eval),
            ]
            return {"skipped": len(bad), "first": bad[:_SHOWN]}

        arrays, facts = stored(key, decode)
    for first in facts["first"]:
        _log.warning("skipped: %s", first)
    if facts["skipped"] > _SHOWN:
        _log.warning("skipped: %d more files", facts["skipped"] - _SHOWN)
    splits = stored_splits(arrays)
    num_train, num_eval = (len(split.labels) for split in splits)
    for name, there, number in (
        ("train", found.train, num_train),
        (found.eval_folder, found.eval, num_eval),
    ):
        if there and not number:
            raise _missing(data, f"`{name}` holds no image")
    return splits, _info(data, found, num_train, num_eval)


def _info(data: ImageFolder, found: Found, num_train: int, num_eval: int) -> ImageInfo:
    skipped = len(found.train) + len(found.eval) - num_train - num_eval
    splits = f"train and {found.eval_folder}" if found.train else found.eval_folder
    about = f"{splits}, {len(found.classes)} classes"
    return ImageInfo(
        num_train=num_train,
        num_eval=num_eval,
        input_shape=(3, data.size, data.size),
        num_classes=len(found.classes),
        source=f"{data.path} ({about}{f', {skipped:,} files skipped' if skipped else ''})",
        classes=found.classes,
    )


@contextmanager
def _readable(data: ImageFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise user_error(what, path="data.path", exit_code=Exit.ENVIRONMENT) from error


def _found(data: ImageFolder) -> Found:
    folder = Path(data.path)
    if not folder.is_dir():
        raise _missing(data, "no such folder")
    eval_folder = next((name for name in EVAL_FOLDERS if (folder / name).is_dir()), None)
    has_train = (folder / "train").is_dir()
    # Nothing is taken from training images where it is given: they are needed to train only.
    if eval_folder is None or not (has_train or data.normalise):
        raise _missing(data, f"no folder `train`, or none of {one_of(EVAL_FOLDERS)}")
    with _readable(data):
        classes = tuple(_names(folder / ("train" if has_train else eval_folder)))
        if unknown := sorted(set(_names(folder / eval_folder)) - set(classes)):
            raise _missing(data, f"`{eval_folder}` has the class `{unknown[0]}`, and `train` not")
        splits = [
            tuple(
                (path, number)
                for number, name in enumerate(classes)
                for path in sorted((folder / split / name).glob("*"))
                if path.is_file() and not path.name.startswith(".")
            )
            for split in ("train", eval_folder)
        ]
    for name, split in zip(("train", eval_folder), splits, strict=True):
        if not split and (has_train or name == eval_folder):
            raise _missing(data, f"`{name}` holds no folders with files")
    if len(classes) < 2:
        raise _missing(data, f"`train` has the class `{classes[0]}` alone: nothing to tell apart")
    train, evaluation = splits
    return Found(classes, train, evaluation, eval_folder)


def _names(folder: Path) -> list[str]:
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(name for name in names if not name.startswith("."))


def _missing(data: ImageFolder, what: str) -> UserError:
    return user_error(
        f"{data.path}: {what}",
        f"it should hold `train/CLASS/*` and {one_of(f'{name}/CLASS/*' for name in EVAL_FOLDERS)}",
        path="data.path",
        exit_code=Exit.ENVIRONMENT,
    )


def _write(
    writer: Writer, name: str, data: ImageFolder, files: Sequence[tuple[Path, int]]
) -> list[str]:
    """Decode a split into the store; returns what is said of each file that is skipped."""

    def decode(path: Path) -> Tensor | str:
        try:
            return _decoded(path, data.size)
        except Exception as error:  # decoders raise whatever damaged bytes lead them to
            why = str(error) or type(error).__name__
            return f"{path} is not a readable PNG or JPEG image: {why}"

    skipped: list[str] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files) or 1, _CHUNK):  # of no files, no images
            chunk = files[start : start + _CHUNK]
            decoded = list(pool.map(decode, (path for path, _ in chunk)))
            skipped += [why for why in decoded if isinstance(why, str)]
            if skipped and data.on_error == "stop":
                raise user_error(
                    skipped[0],
                    "remove it, or use `on_error: skip`",
                    path="data.path",
                    exit_code=Exit.ENVIRONMENT,
                )
            kept = [
                (image, label)
                for image, (_, label) in zip(decoded, chunk, strict=True)
                if isinstance(image, Tensor)
            ]
            images = torch.empty(len(kept), 3, data.size, data.size, dtype=torch.uint8)
            for index, (image, _) in enumerate(kept):
                images[index] = image
            labels = torch.tensor([label for _, label in kept], dtype=torch.int64)
            write_split(writer, name, Split(images, labels))
    return skipped


def _decoded(path: Path, size: int) -> Tensor:
    """The middle square of an image whose shorter side is made `size` long: [3, size, size]."""
    with Image.open(path, formats=_FORMATS) as image:
        if image.mode.startswith("I"):  # gray of 16 bits, of which `convert` would make white
            high = (np.asarray(image) >> 8).astype(np.uint8)
            picture = Image.fromarray(high).convert("RGB")
        else:
            picture = image.convert("RGB")
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels: Tensor = pil_to_tensor(picture.crop((left, top, left + size, top + size)))
    return pixels
