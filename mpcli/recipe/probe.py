"""`probe`: how often the tensors of a step are looked at."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mpcli.recipe.base import Count, Section, mistake

_Interval = Annotated[int, Field(ge=0, lt=2**31)]


class Probe(Section):
    """What `layers.jsonl` holds. The training is the same with it and without it."""

    every: _Interval = Field(
        default=100, description="the first step and every N-th are sampled; 0: none"
    )
    shadow_every: _Interval = Field(
        default=0,
        description="sampled steps that are computed in fp32 as well, to prove what was flushed to "
        "zero: a multiple of `every`; takes an fp32 model's memory. 0: none",
    )
    steps: Annotated[tuple[Count, ...], Field(strict=False, max_length=1000)] = Field(
        default=(), description="sampled as well; in half precision beside an fp32 shadow"
    )

    @model_validator(mode="after")
    def _shadows_are_sampled(self) -> Probe:
        if self.shadow_every and (not self.every or self.shadow_every % self.every):
            fitting = self.shadow_every if not self.every else self.every
            raise mistake(
                "shadows belong to sampled steps, so it must be a multiple of `every`, which is "
                f"{self.every}",
                f"such as `shadow_every: {10 * fitting}`"
                if self.every
                else f"set `every: {fitting}`",
                "shadow_every",
            )
        return self
