"""`optim`: the optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpcli.recipe.base import Count, Fraction, NonNegative, Positive, Section, mistake

Warmup = Annotated[Fraction, Field(description="share of the run over which the rate rises")]


class Constant(Section):
    """The learning rate stays at `lr` after the warm-up."""

    kind: Literal["constant"]
    warmup: Warmup = 0.0


class Linear(Section):
    """Straight line from `lr` after the warm-up to zero at the end."""

    kind: Literal["linear"]
    warmup: Warmup = 0.0


class Cosine(Section):
    """Half a cosine from `lr` after the warm-up to zero at the end (SGDR, 2017)."""

    kind: Literal["cosine"]
    warmup: Warmup = 0.0


class OneCycle(Section):
    """Cosine up from lr/25 and down to lr/250,000, as `torch.optim.lr_scheduler.OneCycleLR`."""

    kind: Literal["one-cycle"]
    warmup: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.3, description="share of the run over which the rate rises"
    )


Schedule = Annotated[Constant | Linear | Cosine | OneCycle, Field(discriminator="kind")]


class _Optimizer(Section):
    lr: Positive = Field(description="peak learning rate")
    schedule: Schedule = Field(
        default=Constant(kind="constant"), description="course of the learning rate over the run"
    )


class Sgd(_Optimizer):
    """Stochastic gradient descent."""

    kind: Literal["sgd"]
    momentum: Fraction = Field(default=0.0, description="share of the last update kept")
    nesterov: bool = Field(default=False, description="look ahead along the momentum")
    weight_decay: NonNegative = Field(default=0.0, description="not on norms and biases")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise mistake(
                "needs a momentum", "add `momentum: 0.9`, or write `nesterov: false`", "nesterov"
            )
        return self


Epsilon = Annotated[float, Field(ge=1e-30, le=1e30)]  # not zero in fp32
RootEpsilon = Annotated[float, Field(ge=1e-18, le=1e18)]  # nor is its square
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]


class Adam(_Optimizer):
    """Adam (Kingma & Ba 2015); weight decay is added to the gradient."""

    kind: Literal["adam"]
    betas: Betas = Field(default=(0.9, 0.999), description="decay of both moment estimates")
    eps: Epsilon = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(default=0.0, description="not on norms and biases")


class AdamW(_Optimizer):
    """AdamW (Loshchilov & Hutter 2019); weight decay is applied to the weight."""

    kind: Literal["adamw"]
    betas: Betas = Field(default=(0.9, 0.999), description="decay of both moment estimates")
    eps: Epsilon = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(default=0.01, description="not on norms and biases")


class AdamW8bit(_Optimizer):
    """AdamW whose moments are stored in 8 bits, by blocks (Dettmers et al. 2022)."""

    kind: Literal["adamw8bit"]
    implementation: Literal["bitsandbytes", "torchao"] = Field(
        default="bitsandbytes", description="package that steps it, an extra of mptrain"
    )
    min_8bit_size: Count = Field(
        default=4096, description="elements of a weight from which on its moments have 8 bits"
    )
    betas: Betas = Field(default=(0.9, 0.999), description="decay of both moment estimates")
    eps: Epsilon = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(default=0.01, description="not on norms and biases")


class Adafactor(_Optimizer):
    """Adafactor (Shazeer & Stern 2018): the second moment of a matrix is its rows' and columns'."""

    kind: Literal["adafactor"]
    beta2_decay: Annotated[float, Field(gt=-1, lt=0)] = Field(
        default=-0.8, description="the second moment decays by 1 - step^beta2_decay"
    )
    eps: Annotated[tuple[RootEpsilon, Epsilon], Field(strict=False)] = Field(
        default=(1e-15, 1e-3),
        description="least root of a second moment; least root mean square that a weight counts as",
    )
    clipping_threshold: Annotated[float, Field(ge=1, le=1e30)] = Field(
        default=1.0, description="largest root mean square of an update"
    )
    weight_decay: NonNegative = Field(default=0.0, description="not on norms and biases")


class Muon(_Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, scaled to AdamW's step (Liu et al. 2025);
    AdamW for embeddings, the last layer and whatever is no matrix."""

    kind: Literal["muon"]
    momentum: Fraction = Field(default=0.95, description="share of the last update kept")
    nesterov: bool = Field(default=True, description="look ahead along the momentum")
    betas: Betas = Field(default=(0.9, 0.999), description="of AdamW's moment estimates")
    eps: Epsilon = Field(default=1e-8, description="of AdamW")
    weight_decay: NonNegative = Field(default=0.1, description="not on norms and biases")


Optim = Annotated[Sgd | Adam | AdamW | AdamW8bit | Adafactor | Muon, Field(discriminator="kind")]
