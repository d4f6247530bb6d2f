"""`task`: what is learnt, and by which model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mpcli.recipe.base import FolderPath, Fraction, LocalOrHub, Section, mistake
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


def _bert(layers: int, width: int, heads: int) -> tuple[str, dict[str, int]]:
    return "bert", {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


TEXT_MODELS = {
    # Turc et al., Well-Read Students Learn Better, 2019
    "bert-tiny": _bert(2, 128, 2),
    "bert-mini": _bert(4, 256, 4),
    "bert-small": _bert(4, 512, 8),
    "bert-medium": _bert(8, 512, 8),
    # Devlin et al., BERT, 2019
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "gpt2-tiny": ("gpt2", {"n_layer": 2, "n_embd": 128, "n_head": 2}),
    "gpt2-mini": ("gpt2", {"n_layer": 4, "n_embd": 256, "n_head": 4}),
}
"""Name -> model type of transformers, and values of its config."""


class ModelConfig(Section):
    """A model of transformers with fresh weights."""

    kind: Literal["config"]
    name: str = Field(
        description=", ".join(f"`{name}`" for name in TEXT_MODELS)
        + ", or any model type of transformers, such as `gpt2` or `roberta`"
    )
    values: dict[str, bool | int | float | str | None] = Field(
        default={}, description="values of its config, such as `hidden_size: 256`"
    )


class PretrainedModel(LocalOrHub):
    """A model of transformers, with its weights."""

    kind: Literal["pretrained"]


TextModel = Annotated[ModelConfig | PretrainedModel, Field(discriminator="kind")]


class TextTask(Section):
    """What tasks on text have in common."""

    DATA: ClassVar[tuple[str, ...]] = ("text", "datasets")

    model: TextModel | None = Field(default=None, description="what is trained")
    init_from: FolderPath | None = Field(
        default=None,
        description="instead of `model`: a finished run of text (or its `final`), with its "
        "weights and its tokenizer",
    )
    attention: Literal["sdpa", "eager"] = Field(
        default="sdpa", description="fused attention, or one whose softmax is an operation"
    )

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.model is None and self.init_from is None:
            raise mistake(
                "neither `model` nor `init_from` is set",
                "add `model: {kind: config, name: bert-tiny}` or `init_from: RUN_DIR`",
            )
        if self.model is not None and self.init_from is not None:
            raise mistake("`model` and `init_from` are both set", "remove one of them", "init_from")
        return self


class MaskedLm(TextTask):
    """Masked language modelling (BERT, Devlin et al. 2019): guess hidden tokens of packed text."""

    kind: Literal["masked-lm"]
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.15,
        description="share of the tokens to guess: 80% of them hidden, 10% replaced, 10% kept",
    )
    whole_word: bool = Field(default=False, description="all tokens of a word, or none")


class CausalLm(TextTask):
    """Causal language modelling (GPT): guess the next token of packed text."""

    kind: Literal["causal-lm"]


class SequenceClassification(TextTask):
    """One label for a text, or for two texts that are compared."""

    DATA: ClassVar[tuple[str, ...]] = ("datasets",)

    kind: Literal["sequence-classification"]


Task = Annotated[
    ImageClassification | MaskedLm | CausalLm | SequenceClassification | Plugin,
    Field(discriminator="kind"),
]
