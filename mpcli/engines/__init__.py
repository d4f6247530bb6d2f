"""Engines: the classes that execute a step."""

from __future__ import annotations

from typing import assert_never

from mpcli.engines import local
from mpcli.precision.numerics import Numerics
from mpcli.recipe.engine import Engine, Local


def mode_problems(engine: Engine, meaning: Numerics) -> list[str]:
    """Why an engine cannot honour a precision mode; empty where it can."""
    match engine:
        case Local():
            return local.mode_problems(meaning)
        case _:
            assert_never(engine)
