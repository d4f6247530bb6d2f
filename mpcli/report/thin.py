"""As few points of a curve as a screen can show, with all of its extremes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def kept(curves: Sequence[Numbers], always: NDArray[np.bool_], buckets: int) -> NDArray[np.intp]:
    """Indices of the points to keep, in order.

    Args:
        curves: of the same points; of each, every bucket keeps its smallest and its largest
            finite value, and the ends are kept.
        always: points that are kept whatever they are.
        buckets: of as many consecutive points each.
    """
    length = len(always)
    if length <= buckets * 2 * len(curves):
        return np.arange(length)
    width = -(-length // buckets)
    chosen = [np.flatnonzero(always), np.array([0, length - 1])]
    starts = np.arange(0, length, width)
    for curve in curves:
        for sign in (1, -1):
            filled = np.full(len(starts) * width, np.inf)
            filled[:length] = np.where(np.isfinite(curve), sign * curve, np.inf)
            smallest = filled.reshape(-1, width).argmin(axis=1) + starts
            chosen.append(smallest[smallest < length])
    return np.unique(np.concatenate(chosen))
