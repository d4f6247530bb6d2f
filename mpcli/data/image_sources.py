"""Where labelled images come from, by the `data` section."""

from __future__ import annotations

from typing import assert_never

from mpcli.data import cifar, digits, imagefolder
from mpcli.data.images import ImageInfo, Splits
from mpcli.recipe.data import Cifar10, Cifar100, Digits, ImageData, ImageFolder


def describe(data: ImageData) -> ImageInfo:
    """The size and the source of a data set, from names, file sizes and metadata only.

    Raises:
        UserError: exit 3, when files are there that cannot be the data set.
    """
    match data:
        case Digits():
            return digits.INFO
        case Cifar10() | Cifar100():
            return cifar.describe(data)
        case ImageFolder():
            return imagefolder.describe(data)
        case _:
            assert_never(data)


def load(data: ImageData) -> tuple[Splits, ImageInfo]:
    """Both splits of a data set, on the CPU; downloaded first where it is nowhere to be found.

    Raises:
        UserError: exit 3, when the data is missing, damaged or not what it should be.
    """
    match data:
        case Digits():
            return digits.load(), digits.INFO
        case Cifar10() | Cifar100():
            return cifar.load(data)
        case ImageFolder():
            return imagefolder.load(data)
        case _:
            assert_never(data)
