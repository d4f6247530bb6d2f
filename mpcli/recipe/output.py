"""`output`: what a run writes beside its records."""

from __future__ import annotations

from pydantic import Field

from mpcli.recipe.base import Count, Duration, Section


class Output(Section):
    """Checkpoints, to go on from after whatever ended a run, and optional outputs."""

    checkpoint_every: Duration | None = Field(
        default="1 epoch",
        description="`N steps`, `N epochs` or `N minutes`, and at the end; null: only when a "
        "signal stops the run",
    )
    keep_last: Count = Field(default=2, description="newest checkpoints that are kept")
    tensorboard: bool = Field(
        default=False, description="write TensorBoard events (extra `tensorboard`)"
    )
