"""`precision`: which numbers are computed in which type, and the loss scale."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mpcli.recipe.base import Count, Section, mistake

Mode = Literal["fp32", "bf16", "fp16"]

Scale = Annotated[float, Field(ge=2.0**-126, le=2.0**127)]
"""A factor on the loss: a normal number of fp32."""


class NoScale(Section):
    """The loss is not scaled."""

    kind: Literal["none"]


class StaticScale(Section):
    """One scale for the whole run."""

    kind: Literal["static"]
    scale: Scale = Field(description="factor on the loss before backward")


class DynamicScale(Section):
    """Grows after a run of good steps, backs off on overflow (as `torch.amp.GradScaler`)."""

    kind: Literal["dynamic"]
    init_scale: Scale = Field(default=65536.0, description="scale of the first step")
    growth_factor: float = Field(default=2.0, gt=1, description="factor of growth")
    backoff_factor: float = Field(default=0.5, gt=0, lt=1, description="factor on overflow")
    growth_interval: Count = Field(default=2000, description="good steps in a row before growth")
    min_scale: Scale = Field(default=1.0, description="the scale never falls below")
    max_scale: Scale = Field(default=16777216.0, description="the scale never grows above")
    hysteresis: Count = Field(
        default=1,
        description="back off on this many overflows since the last growth or back-off",
    )

    @model_validator(mode="after")
    def _within_bounds(self) -> DynamicScale:
        if self.min_scale > self.max_scale:
            raise mistake(
                f"{self.min_scale:.10g} is above max_scale = {self.max_scale:.10g}",
                "write min_scale <= init_scale <= max_scale",
                "min_scale",
            )
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise mistake(
                f"{self.init_scale:.10g} is not between min_scale = {self.min_scale:.10g} "
                f"and max_scale = {self.max_scale:.10g}",
                "write min_scale <= init_scale <= max_scale",
                "init_scale",
            )
        return self


LossScale = Annotated[NoScale | StaticScale | DynamicScale, Field(discriminator="kind")]


def _default_scale(given: dict[str, Any]) -> LossScale:
    unscaled = given.get("mode", "fp32") in ("fp32", "bf16")
    return NoScale(kind="none") if unscaled else DynamicScale(kind="dynamic")


class Precision(Section):
    """Numeric format of the run."""

    mode: Mode = Field(
        default="fp32",
        description="`fp32`: everything in fp32; `fp16`, `bf16`: fp32 weights, autocast compute",
    )
    loss_scale: LossScale = Field(
        default_factory=_default_scale,
        description="without it, `dynamic` in fp16 and `none` elsewhere",
    )
