"""`eval`: when the model is evaluated."""

from __future__ import annotations

from pydantic import Field

from mpcli.recipe.base import Duration, Section


class Eval(Section):
    """The end of a run is always evaluated."""

    every: Duration | None = Field(
        default="1 epoch", description="`N steps`, `N epochs` or `N minutes`; null: at the end only"
    )
