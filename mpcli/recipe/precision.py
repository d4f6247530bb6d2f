"""`precision`: which numbers are computed in which type, and the loss scale."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from mpcli.recipe.base import Count, Section, check_once, mistake
from mpcli.recipe.errors import closest

Mode = Literal[
    "fp32", "tf32", "fp16", "bf16", "fp16-master", "bf16-master", "fp16-pure", "bf16-pure"
]

Scale = Annotated[float, Field(ge=2.0**-126, le=2.0**127)]
"""A factor on the loss: a normal number of fp32."""

MAX_POINTS = 1000
_POINTS = "such as `[[0, 65536], [1000, 1024]]`: 65536 for 1,000 steps, then 1024"


def _check_list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise mistake("expected a list of points `[step, scale]`", _POINTS)
    if not any(isinstance(point, list | tuple) for point in value):
        raise mistake("the list holds no points `[step, scale]`", _POINTS)
    if len(value) > MAX_POINTS:
        raise mistake(f"at most {MAX_POINTS:,} points, this list has {len(value):,}", "thin it out")
    return value


def _check_pair(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise mistake("expected a point `[step, scale]`", "such as `[1000, 1024]`")
    if len(value) != 2:
        what = f"a point has two values, `[step, scale]`; this one has {len(value)}"
        raise mistake(what, "such as `[1000, 1024]`")
    return value


def _check_order(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if points[0][0] != 0:
        raise mistake(
            f"the first point is at step {points[0][0]}",
            f"begin with `[0, {points[0][1]:.10g}]`, the value of the first step",
            "0.0",
        )
    for index in range(1, len(points)):
        before, step = points[index - 1][0], points[index][0]
        if step <= before:
            raise mistake(
                f"step {step} does not come after step {before}",
                "list the points by rising step, each step once",
                f"{index}.0",
            )
    return points


Point = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**31)], Scale],
    Field(strict=False),
    BeforeValidator(_check_pair),
]
Points = Annotated[
    tuple[Point, ...],
    Field(strict=False),
    BeforeValidator(_check_list),
    AfterValidator(_check_order),
]
"""(attempted steps, value) by rising step, the first at 0: a value holds until the next point."""


def _number_or_points(value: Any) -> str:
    return "points" if isinstance(value, list | tuple) else "number"


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
    min_scale: Annotated[
        Annotated[Scale, Tag("number")] | Annotated[Points, Tag("points")],
        Discriminator(_number_or_points),
    ] = Field(
        default=1.0,
        description="the scale never falls below; a number, or points as those of `scheduled`",
    )
    max_scale: Scale = Field(default=16777216.0, description="the scale never grows above")
    hysteresis: Count = Field(
        default=1,
        description="back off on this many overflows since the last growth or back-off",
    )

    @model_validator(mode="after")
    def _within_bounds(self) -> DynamicScale:
        hint = "write min_scale <= init_scale <= max_scale"
        for index, (_, floor) in enumerate(self.floors):
            if floor > self.max_scale:
                raise mistake(
                    f"{floor:.10g} is above max_scale = {self.max_scale:.10g}",
                    hint if index == 0 else "write min_scale <= max_scale",
                    "min_scale" if isinstance(self.min_scale, float) else f"min_scale.{index}.1",
                )
        first = self.floors[0][1]
        if not first <= self.init_scale <= self.max_scale:
            raise mistake(
                f"{self.init_scale:.10g} is not between min_scale = {first:.10g} "
                f"and max_scale = {self.max_scale:.10g}",
                hint,
                "init_scale",
            )
        return self

    @property
    def floors(self) -> tuple[tuple[int, float], ...]:
        """`min_scale` as points: (attempted steps, lowest scale)."""
        return ((0, self.min_scale),) if isinstance(self.min_scale, float) else self.min_scale


class ScheduledScale(Section):
    """Follows the attempted steps alone: an overflow does not change it."""

    kind: Literal["scheduled"]
    points: Points = Field(
        description="`[step, scale]`, the first of step 0: the scale after that many attempted "
        "steps, until the next point"
    )


LossScale = Annotated[
    NoScale | StaticScale | DynamicScale | ScheduledScale, Field(discriminator="kind")
]

GROUPS = ("norm", "softmax", "attention", "embedding", "head", "loss")
"""Words of `sensitive_layers` that stand for layers by what they are."""


def _check_pattern(pattern: str) -> str:
    if not re.fullmatch(r"[\w.*?!\[\]-]+", pattern):
        raise mistake(
            "expected a group, a module path or a class name",
            "such as `norm`, `encoder.0.*` or `LayerNorm`",
        )
    if not all(pattern.split(".")):
        raise mistake("expected names between the dots", "such as `encoder.0` or `encoder.*`")
    is_word = re.fullmatch("[a-z]+", pattern) and pattern not in GROUPS
    if is_word and (group := closest(pattern, GROUPS, cutoff=0.75)):
        raise mistake(
            f"unknown group `{pattern}`",
            f"did you mean `{group}`? A module of that name is written `{pattern}*`",
        )
    return pattern


Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_check_pattern)], ...],
    Field(strict=False),
    AfterValidator(check_once),
]


def _default_scale(given: dict[str, Any]) -> LossScale:
    scaled = str(given.get("mode")).startswith("fp16")
    return DynamicScale(kind="dynamic") if scaled else NoScale(kind="none")


class Precision(Section):
    """Numeric format of the run."""

    mode: Mode = Field(
        default="fp32",
        description="`fp32`, `tf32`: fp32 everywhere, products in fp32 or TF32; "
        "`fp16`, `bf16`: fp32 weights, autocast compute; `-master`: half-precision weights and "
        "compute, fp32 norms and master weights; `-pure`: half precision everywhere",
    )
    sensitive_layers: Patterns = Field(
        default=(),
        description="layers computed in fp32 in every half mode: groups (`norm`, `softmax`, "
        "`attention`, `embedding`, `head`, `loss`), module paths with `*`, class names",
    )
    loss_scale: LossScale = Field(
        default_factory=_default_scale,
        description="without it, `dynamic` in the fp16 modes and `none` elsewhere",
    )
    stochastic_rounding: bool = Field(
        default=False, description="round updated weights stochastically; in `bf16-pure` only"
    )

    @model_validator(mode="after")
    def _rounds_pure_weights(self) -> Precision:
        if self.stochastic_rounding and self.mode != "bf16-pure":
            raise mistake(
                f"mode `{self.mode}` does not round its weights stochastically",
                "write `mode: bf16-pure`, or remove the line",
                "stochastic_rounding",
            )
        return self
