"""CIFAR-10 and CIFAR-100 in facts, and what their stored layouts share.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from mpcli.data.images import Split
from mpcli.recipe.errors import Exit, UserError, user_error

CHANNELS, SIZE = 3, 32
PIXELS = CHANNELS * SIZE * SIZE


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets, as published."""

    kind: Literal["cifar10", "cifar100"]
    title: str
    num_classes: int
    num_train: int
    num_eval: int
    label_columns: tuple[str, ...]  # of the parquet layout, the first that is there
    label_bytes: int  # before an image of the binary version; the last one is the label
    python_folder: str
    python_files: tuple[tuple[str, ...], tuple[str, ...]]
    binary_folder: str
    binary_files: tuple[tuple[str, ...], tuple[str, ...]]
    classes: tuple[str, ...] = ()  # their names


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

CIFAR10 = Cifar(
    kind="cifar10",
    title="CIFAR-10",
    num_classes=10,
    num_train=50_000,
    num_eval=10_000,
    label_columns=("label",),
    label_bytes=1,
    python_folder="cifar-10-batches-py",
    python_files=(_BATCHES, ("test_batch",)),
    binary_folder="cifar-10-batches-bin",
    binary_files=(tuple(f"{name}.bin" for name in _BATCHES), ("test_batch.bin",)),
    classes=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
)
CIFAR100 = Cifar(
    kind="cifar100",
    title="CIFAR-100",
    num_classes=100,
    num_train=50_000,
    num_eval=10_000,
    label_columns=("fine_label", "label"),
    label_bytes=2,
    python_folder="cifar-100-python",
    python_files=(("train",), ("test",)),
    binary_folder="cifar-100-binary",
    binary_files=(("train.bin",), ("test.bin",)),
)


class Files(NamedTuple):
    """The files of both splits, in order."""

    train: tuple[Path, ...]
    eval: tuple[Path, ...]


class Layout(Protocol):
    """One way in which the data sets are stored in a folder: a module of three functions."""

    def find(self, folder: Path, cifar: Cifar) -> Files | None:
        """The files of this layout in a folder, or None when they are not all there."""

    def count(self, files: Files, cifar: Cifar) -> tuple[int, int]:
        """The number of images of both splits, without reading them."""

    def read(self, paths: Sequence[Path], cifar: Cifar) -> Split:
        """All images of one split."""


def first_complete(
    folders: Sequence[Path], names: tuple[tuple[str, ...], tuple[str, ...]]
) -> Files | None:
    """The named files in the first folder that has them all."""
    for folder in folders:
        files = Files(*(tuple(folder / name for name in split) for split in names))
        if all(path.is_file() for path in (*files.train, *files.eval)):
            return files
    return None


def bad_file(
    path: Path, what: str, hint: str = "download it again, or set `data.path`"
) -> UserError:
    """The error for a file that is there and is not what it should be."""
    return user_error(f"{path}: {what}", hint, path="data", exit_code=Exit.ENVIRONMENT)
