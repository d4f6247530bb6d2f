"""How the loss of a run went, and how far its steps moved the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpcli.diagnose.evidence import Evidence, History, Sample
from mpcli.records import LayerRecord

SPIKE = 3.0
"""Times the loss of the untrained model: more than any of its batches differ by."""
LEARNT = 0.25
"""Share of the first loss that training must take away to have learnt anything sure."""
FEWEST = 20
"""Steps before which a loss that stays where it is says nothing."""

STEEP = 10.0
"""RMS of a weight's gradient over that of the weight, before any update. In sound runs of four
small models in seven modes it was at most 2.5; at 10 a rate of 0.01 moves weights by a tenth."""


@dataclass(frozen=True)
class Course:
    """The loss of a run, in three numbers.

    Attributes:
        start: of the first step, before any update.
        end: median of the last quarter of the steps; infinite where most are not finite.
        highest: finite one.
        steps: that were applied.
    """

    start: float
    end: float
    highest: float
    steps: int

    @property
    def broke(self) -> bool:
        """It ended where it began or above, after it had been far above."""
        return self.end >= self.start and self.highest >= SPIKE * self.start

    @property
    def hardly_falls(self) -> bool:
        """After enough steps to fall, it has not."""
        return self.steps >= FEWEST and self.end > (1 - LEARNT) * self.start


def course_of(history: History) -> Course | None:
    """None where the first loss is not a positive number: nothing can be measured by it."""
    if not len(history) or not 0 < history.loss[0] < math.inf:
        return None
    last = history.loss[-math.ceil(len(history) / 4) :]
    end = float(np.median(np.where(np.isfinite(last), last, math.inf)))
    highest = float(history.loss[history.finite_loss].max())
    return Course(float(history.loss[0]), end, highest, int(history.applied.sum()))


def matrices(sample: Sample, tensor: str) -> dict[str, LayerRecord]:
    """Rows of one kind by parameter, without biases, whose size says nothing: they begin at 0."""
    return {
        row.name: row
        for row in sample.of(tensor)
        if "bias" not in row.name.rpartition(".")[2] and not row.nan and not row.inf
    }


def moved(sample: Sample) -> float | None:
    """RMS of the step's update over that of the weights, of all matrices together.

    None where it was not sampled.
    """
    updates, weights = matrices(sample, "update"), matrices(sample, "weight")
    both = [(updates[name], weights[name]) for name in updates if name in weights]
    step = math.sqrt(sum(row.elements * row.rms**2 for row, _ in both))
    size = math.sqrt(sum(row.elements * row.rms**2 for _, row in both))
    return step / size if size else None


def movements(evidence: Evidence) -> Iterator[tuple[int, float]]:
    """(step, `moved`) of the sampled steps that were applied."""
    history = evidence.history
    applied = set(history.step[history.applied].tolist())
    for sample in evidence.samples:
        if sample.step in applied and (share := moved(sample)) is not None:
            yield sample.step, share


def steep_gradients(evidence: Evidence) -> list[LayerRecord]:
    """Gradients of the first step that are much larger than their weights, the worst first."""
    if not evidence.samples or evidence.samples[0].step != 1:
        return []
    first = evidence.samples[0]
    rows = [row for row in matrices(first, "grad").values() if over_weight(first, row) > STEEP]
    return sorted(rows, key=lambda row: -over_weight(first, row))


def over_weight(sample: Sample, gradient: LayerRecord) -> float:
    """RMS of a gradient, without the loss scale, over that of its weight; 0 where it is unknown."""
    weight = matrices(sample, "weight").get(gradient.name)
    return gradient.rms / gradient.scale / weight.rms if weight and weight.rms else 0.0


def momentum(evidence: Evidence) -> float:
    """Of SGD: the share of the last update that is kept; 0 for others.

    Updates that all point one way add up to 1 / (1 - momentum) of one.
    """
    if evidence.recipe:
        return getattr(evidence.recipe.optim, "momentum", 0.0)
    value = foreign_setting(evidence, "optimizer.momentum")
    return value if 0 <= value < 1 else 0.0


def foreign_setting(evidence: Evidence, name: str) -> float:
    """A number of `foreign.json`'s settings; NaN where there is none."""
    foreign = evidence.foreign
    value = foreign.settings.get(name) if foreign else None
    return float(value) if isinstance(value, int | float) else math.nan


def modules(rows: list[LayerRecord]) -> tuple[str, ...]:
    """Of these rows, each once, in their order."""
    return tuple(dict.fromkeys(row.module for row in rows))
