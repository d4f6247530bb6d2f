"""`output`: what a run writes beside its records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mpcli.recipe.base import Count, Duration, Section, check_once


class Output(Section):
    """Checkpoints, to go on from after whatever ended a run, and optional outputs."""

    checkpoint_every: Duration | None = Field(
        default="1 epoch",
        description="`N steps`, `N epochs` or `N minutes`, and at the end; null: only when a "
        "signal stops the run",
    )
    keep_last: Count = Field(default=2, description="newest checkpoints that are kept")
    keep_best: Literal["loss", "accuracy", "perplexity", "masked_accuracy", "f1"] | None = Field(
        default=None,
        description="evaluation metric whose best value is saved at once, and kept besides",
    )
    async_checkpoint: bool = Field(
        default=False,
        description="train on while a copy of the state, in host memory, is written",
    )
    final_dtype: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="type of the weights in `final/`"
    )
    trackers: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...],
        Field(strict=False),
        AfterValidator(check_once),
    ] = Field(
        default=(),
        description="what else shows the run (each an extra; docs/trackers.md)",
    )
