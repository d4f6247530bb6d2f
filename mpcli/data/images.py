"""Labelled images as they come from a source, before anything is done to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mpcli.data.store import Arrays, Writer


@dataclass(frozen=True)
class ImageInfo:
    """What is known of a data set without reading its images."""

    num_train: int
    num_eval: int
    input_shape: tuple[int, int, int]  # C, H, W
    num_classes: int
    source: str  # where the images come from, in words
    classes: tuple[str, ...] = ()  # their names, where they are known


class Split(NamedTuple):
    """One split of a data set, on the CPU."""

    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64


class Splits(NamedTuple):
    """What a model learns from, and what it is measured on."""

    train: Split
    eval: Split


def write_split(writer: Writer, name: str, split: Split) -> None:
    """Add images and labels to those of a split of the store."""
    writer.append(f"{name}.images", split.images.numpy())
    writer.append(f"{name}.labels", split.labels.numpy())


def stored_splits(arrays: Arrays) -> Splits:
    """What `write_split` wrote of `train` and `eval`; still on the disk."""
    return Splits(
        *(
            Split(*(torch.from_numpy(arrays[f"{name}.{field}"]) for field in Split._fields))
            for name in Splits._fields
        )
    )
