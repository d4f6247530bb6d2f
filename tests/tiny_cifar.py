"""Small folders with what CIFAR is made of: the class is the colour of the image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def tiny_split(num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 3, 32, 32] uint8 and labels [N] 0..9, every label as often as the others."""
    random = np.random.default_rng(seed)
    labels = np.arange(num_images) % 10
    colours = np.random.default_rng(7).integers(40, 216, (10, 3, 1, 1))
    images = colours[labels] + random.integers(-40, 40, (num_images, 3, 32, 32))
    return images.astype(np.uint8), labels


def png(image: np.ndarray) -> bytes:
    """[3, H, W] uint8, encoded without loss."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[int | None],
    *,
    image_column: str = "img",
    label_column: str = "label",
) -> None:
    """One file in the Hugging Face layout."""
    cells = [{"bytes": image, "path": None} for image in images]
    type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(
            {image_column: pa.array(cells, type_), label_column: pa.array(labels, pa.int64())}
        ),
        path,
    )


def write_tiny_cifar(folder: Path, num_train: int = 64, num_eval: int = 32) -> None:
    """`train.parquet` and `test.parquet`, as `data.path` of `cifar10` or `cifar100` takes them."""
    for seed, (name, num_images) in enumerate({"train": num_train, "test": num_eval}.items()):
        images, labels = tiny_split(num_images, seed)
        write_parquet(folder / f"{name}.parquet", [png(image) for image in images], labels.tolist())
