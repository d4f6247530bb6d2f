"""What fp16 makes of gradients at any loss scale, by their exponents in fp32.

A gradient x arrives in fp16 as x * S, rounded to nearest and to even: it is zero where
|x| * S <= 2^-25, subnormal below 2^-14, and infinite from 65520 on. With a scale that is a power of
two each of the first two limits is the edge of a bin, so a histogram of exponents says exactly what
becomes of the values that it counts, but for those that are powers of two themselves: 2^-25 lies in
a bin that is counted as kept. For other scales the values of a bin are taken to be spread evenly in
log2|x|. The largest magnitude, which is exact, says whether anything overflows.

A weight's gradient is made of the gradient of its module's output, so it changes with what rounding
makes of that: by the root of the ratio of the energies (sums of squares) after and before. Values
that become zero take energy away, and those that are rounded up to fp16's smallest number add some.
Else every tensor is judged by itself: that what is zero in one layer is missing in those before it
is not modelled (docs/loss-scale.md has what that costs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mpcli.sweep.results import Fractions, GradientHistogram, LayerFractions

SCALES = tuple(2.0**power for power in range(-8, 33))
"""The scales that are judged, from 2^-8 to 2^32."""
LIMIT = 65520.0
"""The least magnitude that fp16 rounds to infinity."""
_ZERO, _TINIEST, _NORMAL, _LIMIT = -25.0, -24.0, -14.0, math.log2(LIMIT)
"""log2 of fp16's limits: of what becomes zero, its smallest number, its smallest normal one."""


class Prediction:
    """What becomes of the gradients of one run at other scales than its own, which was 1.

    Args:
        histograms: of the tensors that a run in fp16 holds in fp16.
    """

    def __init__(self, histograms: Sequence[GradientHistogram]) -> None:
        self.histograms = [one for one in histograms if one.counts]
        self._elements = np.array([one.elements * (1 - one.zeros) for one in self.histograms])
        self._max = np.array([one.max for one in self.histograms])
        self._known: dict[float, NDArray[np.float64]] = {}

    @cached_property
    def _exponents(self) -> NDArray[np.float64]:
        """[bins]: of every bin that some tensor has."""
        lowest = min(one.lowest or 0 for one in self.histograms)
        end = max((one.lowest or 0) + len(one.counts) for one in self.histograms)
        return np.arange(lowest, end, dtype=np.float64)

    @cached_property
    def _shares(self) -> NDArray[np.float64]:
        """[tensors, bins]: how the values that are not zero spread over the bins."""
        shares = np.zeros((len(self.histograms), len(self._exponents)))
        for row, one in zip(shares, self.histograms, strict=True):
            begin = (one.lowest or 0) - int(self._exponents[0])
            row[begin : begin + len(one.counts)] = np.array(one.counts) / sum(one.counts)
        return shares

    def total(self, scale: float) -> Fractions:
        """Of all values of all tensors that are not zero in fp32."""
        if not self.histograms:
            return Fractions(underflow=0.0, subnormal=0.0, overflow=0.0)
        return _fractions(np.average(self._by_layer(scale), axis=0, weights=self._elements))

    def layers(self, scale: float) -> tuple[LayerFractions, ...]:
        """Of each tensor, in the order of the histograms; without those that are all zero."""
        if not self.histograms:
            return ()
        return tuple(
            LayerFractions(
                module=one.module,
                tensor=one.tensor,
                name=one.name,
                elements=one.elements,
                fractions=_fractions(row),
            )
            for one, row in zip(self.histograms, self._by_layer(scale), strict=True)
        )

    @cached_property
    def largest_scale(self) -> float:
        """The largest of `SCALES` at which nothing overflows; 0 where there is none."""
        largest = max(self._max, default=0.0)
        return max((scale for scale in SCALES if largest * scale < LIMIT), default=0.0)

    @cached_property
    def _energies(self) -> NDArray[np.float64]:
        """[tensors, bins]: how the sum of the squares spreads."""
        energies = self._shares * 4.0**self._exponents
        energies /= energies.sum(axis=1, keepdims=True)
        return energies

    @cached_property
    def _sources(self) -> list[tuple[int, int]]:
        """Rows of weights' gradients, each with that of the output's gradient it is made of."""
        rows = list(enumerate(self.histograms))
        outputs = {one.name: row for row, one in rows if one.tensor == "grad_output"}
        return [
            (row, outputs[one.module])
            for row, one in rows
            if one.tensor == "grad" and one.module in outputs
        ]

    def _by_layer(self, scale: float) -> NDArray[np.float64]:
        """[tensors, 3]: underflow, subnormal, overflow; computed once, but asked for often."""
        if scale not in self._known:
            self._known[scale] = self._judged(scale)
        return self._known[scale]

    def _judged(self, scale: float) -> NDArray[np.float64]:
        scales = np.full(len(self.histograms), math.log2(scale))
        if self._sources:
            weights, outputs = map(list, zip(*self._sources, strict=True))
            kept = self._energies @ _rounded_energy(self._exponents + math.log2(scale))
            with np.errstate(divide="ignore"):  # nothing is left: everything is lost
                scales[weights] += np.log2(kept[outputs]) / 2
        zero = _summed(self._shares, self._below(_ZERO, scales))
        small = _summed(self._shares, self._below(_NORMAL, scales))
        finite = self._shares @ np.clip(_LIMIT - math.log2(scale) - self._exponents, 0.0, 1.0)
        # The largest element may not have been sampled.
        over = np.where(self._max * scale < LIMIT, 0.0, np.fmax(1 - finite, 1 / self._elements))
        return np.stack([zero, small - zero, np.fmin(over, 1.0)], axis=1)

    def _below(self, limit: float, scales: NDArray[np.float64]) -> NDArray[np.float64]:
        """[tensors, bins]: share of each bin below a limit; both in log2."""
        below: NDArray[np.float64] = np.clip(limit - scales[:, None] - self._exponents, 0.0, 1.0)
        return below


def _rounded_energy(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """[bins]: the energy of a bin of scaled values in fp16, over what it is before.

    With n = |x| / 2^-24 spread evenly in log2 over [low, 2 low), an n between j - 1/2 and j + 1/2
    becomes j, and the mean of n^2 is 3 low^2 / (2 ln 2). From 16 on rounding changes nothing here.
    """
    low = 2.0 ** np.clip(exponents - _TINIEST, -2.0, 4.0)[:, None]  # below 1/4 all become zero
    whole = np.arange(1.0, 33.0)
    shares = np.log2(np.fmin(2 * low, whole + 0.5) / np.fmax(low, whole - 0.5))
    rounded = np.fmax(shares, 0.0) @ whole**2
    ratios: NDArray[np.float64] = rounded / (3 * low[:, 0] ** 2 / (2 * math.log(2)))
    return ratios


def _summed(spread: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the bins of each tensor."""
    total: NDArray[np.float64] = np.einsum("ij,ij->i", spread, shares)
    return total


def _fractions(values: NDArray[np.float64]) -> Fractions:
    underflow, subnormal, overflow = values.tolist()
    return Fractions(underflow=underflow, subnormal=subnormal, overflow=overflow)
