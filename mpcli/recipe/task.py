"""`task`: what is learnt, and by which model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mpcli.recipe.base import Fraction, Section, mistake
from mpcli.recipe.plugin import Plugin

Width = Annotated[int, Field(ge=1, le=4096)]


class SmallNet(Section):
    """A small, fast convolutional network for digits and CIFAR."""

    kind: Literal["smallnet"]
    width: Width = Field(default=32, description="channels of the first stage; later ones double")


class ResNet9(Section):
    """The 9-layer residual network of the DAWNBench CIFAR-10 entries."""

    kind: Literal["resnet9"]
    width: Width = Field(default=64, description="channels of the first stage; later ones double")


class TorchvisionModel(Section):
    """Any classification model of torchvision, from random initial weights."""

    kind: Literal["torchvision"]
    name: str = Field(description="torchvision's name of the model, such as `resnet18`")
    stem: Literal["imagenet", "cifar"] = Field(
        default="imagenet",
        description="`cifar` keeps the resolution of small images: 3x3 stride-1 first "
        "convolution, no first pooling",
    )


class Vit(Section):
    """A vision transformer (Dosovitskiy et al. 2021), torchvision's, of any size."""

    kind: Literal["vit"]
    patch_size: Width = Field(default=4, description="pixels per side of a patch, a token")
    layers: Annotated[int, Field(ge=1, le=256)] = Field(default=6, description="encoder blocks")
    heads: Width = Field(default=4, description="of attention; they share the width")
    width: Width = Field(default=256, description="features of a token")
    mlp_width: Annotated[int, Field(ge=1, le=65536)] = Field(
        default=512, description="features inside a block's two layers"
    )
    dropout: Fraction = Field(default=0.0, description="share of activations set to zero")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Vit:
        if self.width % self.heads:
            what = f"{self.heads} heads cannot share a width of {self.width}"
            raise mistake(what, "the width is a multiple of the heads", "heads")
        return self


ImageModel = Annotated[SmallNet | ResNet9 | Vit | TorchvisionModel, Field(discriminator="kind")]


class ImageClassification(Section):
    """One label per image, cross-entropy loss."""

    DATA: ClassVar = (
        "digits",
        "cifar10",
        "cifar100",
        "imagefolder",
    )  # the kinds that have what it learns from

    kind: Literal["image-classification"]
    model: ImageModel
    label_smoothing: Fraction = Field(default=0.0, description="share spread over all classes")
    channels_last: bool = Field(
        default=False, description="store activations as NHWC, the faster layout for convolutions"
    )


Task = Annotated[ImageClassification | Plugin, Field(discriminator="kind")]
