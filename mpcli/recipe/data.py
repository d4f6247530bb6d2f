"""`data`: the examples to learn from and to evaluate on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mpcli.recipe.base import FolderPath, Section

Augment = Annotated[tuple[Literal["flip", "crop", "cutout"], ...], Field(strict=False)]


class Digits(Section):
    """scikit-learn's 1,797 real 8x8 digits; embedded, nothing to download."""

    kind: Literal["digits"]
    augment: Augment = Field(default=(), description="augmentations of training images")


class _Cifar(Section):
    path: FolderPath | None = Field(
        default=None,
        description="folder with the data; null: `$MPTRAIN_DATA/<kind>`, then download",
    )
    augment: Augment = Field(
        default=("flip", "crop"), description="augmentations of training images"
    )


class Cifar10(_Cifar):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 in 10 classes."""

    kind: Literal["cifar10"]


class Cifar100(_Cifar):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 in 100 classes."""

    kind: Literal["cifar100"]


class ImageFolder(Section):
    """PNG and JPEG files in folders `train/<class>` and `val/<class>` (or `validation`, `test`)."""

    kind: Literal["imagefolder"]
    path: FolderPath = Field(description="folder that holds `train` and `val`")
    size: Annotated[int, Field(ge=1, le=1024)] = Field(
        description="pixels per side: the shorter side is scaled to it, the longer one cut"
    )
    augment: Augment = Field(default=(), description="augmentations of training images")
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="what a file does that is no image; `skip` counts it"
    )


ImageData = Digits | Cifar10 | Cifar100 | ImageFolder
"""What has labelled images."""


class PluginData(Section):
    """None of these: the plug-in brings its own, by options of its task."""

    kind: Literal["plugin"]


Data = Annotated[ImageData | PluginData, Field(discriminator="kind")]
