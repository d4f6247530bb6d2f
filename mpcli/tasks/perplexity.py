"""Perplexity, the readable form of a mean cross-entropy."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """e to the mean cross-entropy in nats; infinite where no number can hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
