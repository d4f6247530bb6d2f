"""`output`: what a run writes beside its records."""

from __future__ import annotations

from pydantic import Field

from mpcli.recipe.base import Section


class Output(Section):
    """Optional outputs."""

    tensorboard: bool = Field(
        default=False, description="write TensorBoard events (extra `tensorboard`)"
    )
