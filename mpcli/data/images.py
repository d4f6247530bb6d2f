"""Labelled images as they come from a source, before anything is done to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


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
