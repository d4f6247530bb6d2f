"""What the probe saw of every tensor, in as few characters as a page can show it in."""

from __future__ import annotations

import base64
import math
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpcli.records import LayerRecord, strict_json
from mpcli.rundir import RunDirectory

QUANTITIES = {
    "nonfinite": "NaN or infinite (share)",
    "would_flush": "become 0 in fp16 (share of the non-zero)",
    "flushed": "0 here, and not in fp32 (share)",
    "zeros": "zeros (share)",
    "subnormal": "subnormal (share of the non-zero)",
    "overflow": "at least 65520: infinite in fp16 (share)",
    "range": "largest value, over 65520 where fp16 overflows",
    "update_ratio": "update over weight (RMS)",
    "lost": "updates lost to rounding (share)",
}
"""What a cell of the map of layers can show, what matters most first."""
_LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
SMALLEST_SHARE = 1e-5
_WIDEST = 2000  # exponents; no type has more than fp64's 2,100


@dataclass
class Tensor:
    """One tensor at the sampled steps: histograms are places in one long list of shares."""

    steps: list[int] = field(default_factory=list)
    lowest: list[int | None] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    quantities: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in QUANTITIES}
    )


@dataclass
class Layers:
    """All tensors of a run, by (tensor, name, call)."""

    tensors: dict[tuple[str, str, int], Tensor]
    shares: array[float]

    @property
    def steps(self) -> list[int]:
        """The sampled steps."""
        return sorted({step for tensor in self.tensors.values() for step in tensor.steps})

    @property
    def num_rows(self) -> int:
        """Of all tensors."""
        return sum(len(tensor.steps) for tensor in self.tensors.values())

    def update_ratios(self) -> dict[str, list[float]]:
        """Smallest, median and largest over the layers, at the sampled steps that have any."""
        found: dict[int, list[float]] = {}
        for (kind, _, _), tensor in self.tensors.items():
            if kind == "update":
                ratios = zip(tensor.steps, tensor.quantities["update_ratio"], strict=True)
                for step, ratio in ratios:
                    if math.isfinite(ratio):
                        found.setdefault(step, []).append(ratio)
        steps = sorted(found)
        return {
            "step": [float(step) for step in steps],
            "largest": [max(found[step]) for step in steps],
            "median": [float(np.median(found[step])) for step in steps],
            "smallest": [min(found[step]) for step in steps],
        }

    def packed(self, most_rows: int) -> list[dict[str, Any]]:
        """Each tensor for the page: one character says how many values have an exponent.

        Args:
            most_rows: beyond which neighbouring steps become one, which keeps the worst of them.
        """
        steps = self.steps
        together = math.ceil(self.num_rows / most_rows) if self.num_rows else 1
        bucket = {step: steps[number // together * together] for number, step in enumerate(steps)}
        shares = np.frombuffer(self.shares) if self.shares else np.zeros(0)
        if together == 1:
            text = _levels(shares)
            return [
                _packed(key, tensor, [text[start:end] for start, end in tensor.places])
                for key, tensor in self.tensors.items()
            ]
        return [
            _packed(key, *_merged(tensor, shares, bucket)) for key, tensor in self.tensors.items()
        ]


def read_layers(run: RunDirectory, unread: Counter[str]) -> Layers:
    """The rows of rank 0 that can be read."""
    found = Layers({}, array("d"))
    for row in run.layers(unread):
        if row.rank:
            continue
        start = len(found.shares)
        try:
            lowest = _add_shares(row, found.shares)
            quantities = _quantities(row)
        except (OverflowError, ValueError):
            del found.shares[start:]
            unread["layers.jsonl"] += 1
            continue
        key = (row.tensor, row.name, row.call)
        tensor = found.tensors.get(key)
        if tensor is None:
            tensor = found.tensors[key] = Tensor()
        tensor.steps.append(row.step)
        tensor.lowest.append(lowest)
        tensor.places.append((start, len(found.shares)))
        for values, value in zip(tensor.quantities.values(), quantities, strict=True):
            values.append(value)
    return found


def compressed(value: Any) -> str:
    """JSON, deflated, in base64: the browser has a decompressor of its own."""
    return base64.b64encode(zlib.compress(strict_json(value).encode(), 3)).decode()


def _add_shares(row: LayerRecord, shares: array[float]) -> int | None:
    if not 0 < row.step < 2**53 or not 0 < row.sampled < 2**53 or len(row.exponents) > _WIDEST:
        raise ValueError
    if row.lowest_exponent is not None and abs(row.lowest_exponent) > _WIDEST:
        raise ValueError
    sampled = row.sampled
    shares.extend([count / sampled for count in row.exponents])
    return row.lowest_exponent


def _quantities(row: LayerRecord) -> tuple[float, ...]:
    """In the order of `QUANTITIES`; NaN where no value is left that it could be of."""
    is_finite = row.nan + row.inf < row.elements
    is_number = row.nan < row.elements
    return (
        (row.nan + row.inf) / max(1, row.elements),
        _number(row.would_flush, is_finite),
        _number(row.shadow.flushed if row.shadow else None, is_finite),
        _number(row.zeros, is_finite),
        _number(row.subnormal, is_finite),
        _number(row.at_least_65520, is_number),
        _number(row.max / 65520, is_number),
        _number(row.update_ratio, is_finite),
        _number(row.lost, is_finite),
    )


def _number(value: float | None, known: bool) -> float:
    return math.nan if value is None or not known else value


def _levels(shares: np.ndarray[Any, Any]) -> str:
    """A character for each share: `A` is none, and the others are equal steps of its logarithm."""
    last = len(_LEVELS) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(shares / SMALLEST_SHARE) / -math.log10(SMALLEST_SHARE)
    levels = np.where(shares > 0, np.clip(np.round(1 + decades * (last - 1)), 1, last), 0)
    alphabet = np.frombuffer(_LEVELS.encode(), dtype=np.uint8)
    return alphabet[levels.astype(np.intp)].tobytes().decode()


def _merged(
    tensor: Tensor, shares: np.ndarray[Any, Any], bucket: dict[int, int]
) -> tuple[Tensor, list[str]]:
    """The worst of the steps that become one: the most of everything."""
    groups: dict[int, list[int]] = {}
    for index, step in enumerate(tensor.steps):
        groups.setdefault(bucket[step], []).append(index)
    merged, texts = Tensor(steps=list(groups)), []
    for indices in groups.values():
        lowest, cells = _widest(tensor, shares, indices)
        merged.lowest.append(lowest)
        texts.append(_levels(cells))
        for name, values in tensor.quantities.items():
            known = [values[index] for index in indices if not math.isnan(values[index])]
            merged.quantities[name].append(max(known, default=math.nan))
    return merged, texts


def _widest(
    tensor: Tensor, shares: np.ndarray[Any, Any], indices: Sequence[int]
) -> tuple[int | None, np.ndarray[Any, Any]]:
    found = [
        (lowest, shares[slice(*tensor.places[index])])
        for index in indices
        if (lowest := tensor.lowest[index]) is not None
    ]
    if not found:
        return None, np.zeros(0)
    first = min(lowest for lowest, _ in found)
    cells = np.zeros(max(lowest + len(own) for lowest, own in found) - first)
    for lowest, own in found:
        place = cells[lowest - first : lowest - first + len(own)]
        np.maximum(place, own, out=place)
    return first, cells


def _packed(key: tuple[str, str, int], tensor: Tensor, cells: list[str]) -> dict[str, Any]:
    kind, name, call = key
    quantities = {
        name: ("%.3g," * len(values) % tuple(values))[:-1]
        for name, values in tensor.quantities.items()
        if not all(map(math.isnan, values))
    }
    return {
        "tensor": kind,
        "name": (name or "the model") + (f" (call {call + 1})" if call else ""),
        "steps": tensor.steps,
        "lowest": tensor.lowest,
        "cells": cells,
        "quantities": quantities,
    }
