"""`train`: how long, in which batches, and what happens when numbers go wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mpcli.recipe.base import Count, Section, mistake

_Limit = Annotated[float, Field(ge=1e-30, le=1e30)]  # not zero in fp32


class ClipNorm(Section):
    """Scale all gradients down together when their global L2 norm exceeds `max_norm`."""

    kind: Literal["norm"]
    max_norm: _Limit = Field(description="largest L2 norm of all gradients together")


class ClipValue(Section):
    """Cut every gradient element to the range from `-clip_value` to `clip_value`."""

    kind: Literal["value"]
    clip_value: _Limit = Field(description="largest magnitude of a gradient element")


_Share = Annotated[float, Field(ge=1e-15, le=1e15)]  # the product of two is not 0 in fp32


class ClipAgc(Section):
    """Scale a unit's gradient down when its norm exceeds `clipping` times that of its weights
    (AGC, Brock et al. 2021); the last layer is left alone."""

    kind: Literal["agc"]
    clipping: _Share = Field(default=0.01, description="largest ratio of the two norms")
    eps: _Share = Field(default=1e-3, description="least norm that a unit's weights count as")


Clip = Annotated[ClipNorm | ClipValue | ClipAgc, Field(discriminator="kind")]


class Train(Section):
    """Exactly one of `epochs` and `steps` is named."""

    epochs: Count | None = Field(default=None, description="passes over the training data")
    steps: Count | None = Field(default=None, description="attempted optimizer steps")
    global_batch_size: Count = Field(description="samples per optimizer step, over everything")
    micro_batch_size: Count | Literal["auto"] | None = Field(
        default=None,
        description="most samples per forward, in evaluation too; null: the whole batch. "
        "Smaller values accumulate; `auto`: as many as fit the memory",
    )
    clip: Clip | None = Field(default=None, description="clipping of unscaled gradients")
    on_nonfinite: Literal["skip", "stop", "rollback"] = Field(
        default="skip",
        description="after a step with a NaN or infinite gradient, which changes nothing: go on, "
        "end the run (exit 5), or go back to the newest checkpoint and on with the next batch. "
        "What a lower dynamic scale may mend is no reason to go back",
    )
    max_consecutive_skips: Count = Field(default=50, description="then the run ends (exit 5)")
    max_rollbacks: Count = Field(default=3, description="one more ends the run (exit 5)")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="decay of an average of the weights, evaluated and saved"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of weights, order and augmentation")
    deterministic: bool = Field(default=False, description="only deterministic kernels")

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.epochs is None and self.steps is None:
            raise mistake("how long to train is not said", "add `epochs: 10` or `steps: 1000`")
        if self.epochs is not None and self.steps is not None:
            raise mistake("`epochs` and `steps` are both set", "remove one of them", "steps")
        return self
