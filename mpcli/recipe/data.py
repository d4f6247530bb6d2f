"""`data`: the examples to learn from and to evaluate on."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from mpcli.recipe.base import FilePath, FolderPath, LocalOrHub, Section, mistake

Augment = Annotated[tuple[Literal["flip", "crop", "cutout"], ...], Field(strict=False)]


class Normalise(Section):
    """Mean and standard deviation of each channel, in pixel values: 0..255, of `digits` 0..16."""

    mean: Annotated[tuple[Annotated[float, Field(ge=0, le=255)], ...], Field(strict=False)] = Field(
        description="one value for each channel"
    )
    std: Annotated[tuple[Annotated[float, Field(ge=1e-6, le=255)], ...], Field(strict=False)] = (
        Field(description="one value for each channel")
    )


class _Images(Section):
    CHANNELS: ClassVar[int] = 3

    normalise: Normalise | None = Field(
        default=None, description="mean and deviation of the pixels; null: the training images'"
    )

    @model_validator(mode="after")
    def _one_value_for_each_channel(self) -> Self:
        for name, values in self.normalise or ():
            if len(values) != self.CHANNELS:
                channels = "one channel" if self.CHANNELS == 1 else f"{self.CHANNELS} channels"
                what = f"the images have {channels}, found {len(values)} values"
                raise mistake(what, "give one value for each channel", f"normalise.{name}")
        return self


class Digits(_Images):
    """scikit-learn's 1,797 real 8x8 digits; embedded, nothing to download."""

    CHANNELS = 1

    kind: Literal["digits"]
    augment: Augment = Field(default=(), description="augmentations of training images")


class _Cifar(_Images):
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


class ImageFolder(_Images):
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


class WordPiece(Section):
    """A WordPiece vocabulary learnt from the training text, as BERT's (Devlin et al. 2019)."""

    kind: Literal["wordpiece"]
    vocab_size: Annotated[int, Field(ge=16, le=2**20)] = Field(
        default=8192, description="most entries of the vocabulary"
    )
    lowercase: bool = Field(default=True, description="lower-case the text, without accents")


class PretrainedTokenizer(LocalOrHub):
    """A tokenizer of transformers."""

    kind: Literal["pretrained"]


Tokenizer = Annotated[WordPiece | PretrainedTokenizer, Field(discriminator="kind")]


class _Text(Section):
    tokenizer: Tokenizer | None = Field(
        default=None,
        description="text to tokens; null: the tokenizer of the model that is loaded, or "
        "`wordpiece` for a model with fresh weights",
    )
    sequence_length: Annotated[int, Field(ge=8, le=2**20)] = Field(
        default=128, description="tokens of a sequence; at most so many of a classified text"
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="what a record that cannot be decoded does; `skip` counts them"
    )


class Text(_Text):
    """Plain UTF-8 text, for language models."""

    kind: Literal["text"]
    path: FilePath | None = Field(
        default=None,
        description="a file, or a folder of `.txt` files; null: the help topics of Python's "
        "standard library, 0.5 MB of English",
    )
    eval_path: FilePath | None = Field(
        default=None,
        description="held-out text; null: every tenth stretch of about 4,000 characters",
    )


def _check_columns(names: tuple[str, ...]) -> tuple[str, ...]:
    if not 1 <= len(names) <= 2 or not all(names):
        raise mistake("expected the names of one or two columns", "such as `[sentence]`")
    return names


def _check_split(name: str) -> str:
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise mistake("expected the name of a split", "such as `train` for `train.parquet`")
    return name


Split = Annotated[str, AfterValidator(_check_split)]


class Datasets(_Text, LocalOrHub):
    """A table with columns of text: parquet, JSON lines or CSV files, or a set of the hub."""

    kind: Literal["datasets"]
    subset: str | None = Field(default=None, description="configuration of a set of the hub")
    train_split: Split = Field(default="train", description="such as `train` for `train.parquet`")
    eval_split: Split = Field(default="validation", description="the split to evaluate on")
    text_columns: Annotated[
        tuple[str, ...], AfterValidator(_check_columns), Field(strict=False)
    ] = Field(default=("text",), description="one column of text, or two that are compared")
    label_column: str = Field(
        default="label", description="names or numbers of the labels; unused by language models"
    )
    label_names: Annotated[tuple[str, ...], Field(min_length=2, strict=False)] | None = Field(
        default=None,
        description="what the labels are called, in the order of their numbers; null: whole "
        "numbers from 0, or the training split's names in alphabetical order",
    )


TextData = Text | Datasets
"""What has text."""


class PluginData(Section):
    """None of these: the plug-in brings its own, by options of its task."""

    kind: Literal["plugin"]


Data = Annotated[ImageData | TextData | PluginData, Field(discriminator="kind")]
