"""The Hugging Face layout: parquet files of encoded images and labels."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mpcli.data.cifar.spec import SIZE, Cifar, Files, bad_file
from mpcli.data.images import Split

_IMAGE_COLUMNS = ("img", "image")
_FORMATS = ("PNG", "JPEG")  # some of the others run external programs
_ROWS_PER_TASK = 512


def find(folder: Path, cifar: Cifar) -> Files | None:
    """In the folder itself, or in one of the subfolders that the hub's repositories have."""
    for place in (folder, folder / "data", folder / "plain_text", folder / cifar.kind):
        files = Files(_shards(place, "train"), _shards(place, "test"))
        if files.train and files.eval:
            return files
    return None


def _shards(folder: Path, split: str) -> tuple[Path, ...]:
    whole = folder / f"{split}.parquet"
    return (whole,) if whole.is_file() else tuple(sorted(folder.glob(f"{split}-*.parquet")))


def count(files: Files, cifar: Cifar) -> tuple[int, int]:
    """From the files' metadata.

    Raises:
        UserError: exit 3, a file is not parquet, lacks a column, or a shard is missing.
    """
    for paths in files:
        shards = re.search(r"-of-(\d+)\.parquet$", paths[0].name)
        if shards and int(shards[1]) != len(paths):
            raise bad_file(
                paths[0].parent, f"has {len(paths)} of {int(shards[1])} shards of `{paths[0].name}`"
            )
    num_train, num_eval = (sum(_open(path, cifar)[1] for path in paths) for paths in files)
    for paths, num_images in zip(files, (num_train, num_eval), strict=True):
        if num_images == 0:
            raise bad_file(paths[0], "holds no images")
    return num_train, num_eval


def read(paths: Sequence[Path], cifar: Cifar) -> Split:
    """Decode all images, in threads.

    Raises:
        UserError: exit 3, a row is not a labelled 32x32 image; the row is named.
    """
    splits = [_read_file(path, cifar) for path in paths]
    return Split(*(torch.cat(tensors) for tensors in zip(*splits, strict=True)))


def _open(path: Path, cifar: Cifar) -> tuple[tuple[str, str], int]:
    """The names of the image and the label column, and the number of rows."""
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise bad_file(path, f"is not a readable parquet file: {error}") from error
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in cifar.label_columns if name in schema.names), None)
    found = ", ".join(f"`{name}`" for name in schema.names)
    if image is None or not _holds_bytes(schema.field(image).type):
        raise bad_file(path, f"has no column `img` or `image` of encoded images, but {found}")
    if label is None or not pa.types.is_integer(schema.field(label).type):
        wanted = " or ".join(f"`{name}`" for name in cifar.label_columns)
        raise bad_file(path, f"has no column {wanted} of whole numbers, but {found}")
    return (image, label), metadata.num_rows


def _holds_bytes(type_: pa.DataType) -> bool:
    return isinstance(type_, pa.StructType) and type_.get_field_index("bytes") >= 0


def _read_file(path: Path, cifar: Cifar) -> Split:
    (image, label), _ = _open(path, cifar)
    try:
        table = pq.read_table(path, columns=[image, label])
    except (pa.ArrowException, OSError) as error:
        raise bad_file(path, f"is damaged: {error}") from error
    encoded: list[dict[str, Any] | None] = table.column(image).to_pylist()
    labels: list[int | None] = table.column(label).to_pylist()
    for row, value in enumerate(labels):
        if value is None or not 0 <= value < cifar.num_classes:
            raise bad_file(path, f"row {row}: label {value} is not in 0..{cifar.num_classes - 1}")

    pixels = np.empty((len(encoded), SIZE, SIZE, 3), np.uint8)

    def decode_from(start: int) -> None:
        for row in range(start, min(start + _ROWS_PER_TASK, len(encoded))):
            pixels[row] = _decode(encoded[row], path, row)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_from, range(0, len(encoded), _ROWS_PER_TASK)):
            pass
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(labels, dtype=torch.int64))


def _decode(cell: dict[str, Any] | None, path: Path, row: int) -> np.ndarray[Any, Any]:
    """[32, 32, 3] uint8."""
    content = cell["bytes"] if cell else None
    if content is None:
        raise bad_file(path, f"row {row}: holds no image bytes")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.size == (SIZE, SIZE):  # known from the header: nothing large is decoded
                return np.asarray(image.convert("RGB"))
            width, height = image.size
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise bad_file(path, f"row {row}: is not a readable PNG or JPEG image: {error}") from error
    raise bad_file(path, f"row {row}: the image is {width}x{height}, not {SIZE}x{SIZE}")
