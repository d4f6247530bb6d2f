"""The binary version: records of label bytes and 3,072 pixel bytes, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mpcli.data.cifar.spec import CHANNELS, PIXELS, SIZE, Cifar, Files, bad_file, first_complete
from mpcli.data.images import Split


def find(folder: Path, cifar: Cifar) -> Files | None:
    """In the folder itself, or in the one that the archive makes."""
    return first_complete((folder, folder / cifar.binary_folder), cifar.binary_files)


def count(files: Files, cifar: Cifar) -> tuple[int, int]:
    """As published, when the sizes of the files are.

    Raises:
        UserError: exit 3, a file has another size.
    """
    record = cifar.label_bytes + PIXELS
    for paths, num_images in zip(files, (cifar.num_train, cifar.num_eval), strict=True):
        expected = num_images // len(paths) * record
        for path in paths:
            size = path.stat().st_size
            if size != expected:
                raise bad_file(path, f"has {size:,} bytes instead of {expected:,}")
    return cifar.num_train, cifar.num_eval


def read(paths: Sequence[Path], cifar: Cifar) -> Split:
    """All records.

    Raises:
        UserError: exit 3, a label is out of range.
    """
    record = cifar.label_bytes + PIXELS
    splits = []
    for path in paths:
        rows = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(-1, record)
        labels = rows[:, cifar.label_bytes - 1].long()
        wrong = (labels >= cifar.num_classes).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise bad_file(
                path, f"record {row}: label {int(labels[row])} is not below {cifar.num_classes}"
            )
        images = rows[:, cifar.label_bytes :].reshape(-1, CHANNELS, SIZE, SIZE)
        splits.append(Split(images, labels))
    return Split(*(torch.cat(tensors) for tensors in zip(*splits, strict=True)))
