"""The python version: pickles, which are loaded only after their MD5 matched torchvision's list."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch

from mpcli.data.cifar.archive import published
from mpcli.data.cifar.spec import CHANNELS, SIZE, Cifar, Files, bad_file, first_complete
from mpcli.data.images import Split


def find(folder: Path, cifar: Cifar) -> Files | None:
    """In the folder itself, or in the one that the archive makes."""
    return first_complete((folder, folder / cifar.python_folder), cifar.python_files)


def count(files: Files, cifar: Cifar) -> tuple[int, int]:
    """As published: `read` accepts no other files."""
    return cifar.num_train, cifar.num_eval


def read(paths: Sequence[Path], cifar: Cifar) -> Split:
    """All batches. The bytes that were hashed are the bytes that are unpickled.

    Raises:
        UserError: exit 3, a file is not the published one; it is not unpickled then.
    """
    files = published(cifar)
    known = dict((*files.train_list, *files.test_list))
    splits = []
    for path in paths:
        content = path.read_bytes()
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != known[path.name]:
            raise bad_file(
                path,
                f"is not the published file: MD5 {md5} instead of {known[path.name]}",
                "it was not opened; download it again",
            )
        batch = pickle.loads(content, encoding="latin1")
        images = torch.from_numpy(batch["data"]).view(-1, CHANNELS, SIZE, SIZE)
        labels = batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
        splits.append(Split(images, torch.tensor(labels, dtype=torch.int64)))
    return Split(*(torch.cat(tensors) for tensors in zip(*splits, strict=True)))
