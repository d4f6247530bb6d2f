"""Everything that checks reason from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpcli.diagnose.facts import Facts
from mpcli.recipe.recipe import Recipe
from mpcli.records import EvalRecord, ForeignRun, LayerRecord, LoopRecord, Plan, Replay


@dataclass(frozen=True)
class History:
    """`steps.jsonl` as columns: one element for each attempted step, in order."""

    step: NDArray[np.int64]
    loss: NDArray[np.float64]
    lr: NDArray[np.float64]
    grad_norm: NDArray[np.float64]  # unscaled, before clipping
    scale: NDArray[np.float64]
    applied: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.step)

    @property
    def skipped(self) -> NDArray[np.bool_]:
        """Steps that changed nothing, as their gradients were not finite."""
        return ~self.applied

    @property
    def finite_loss(self) -> NDArray[np.bool_]:
        """Steps whose loss is a number."""
        return np.isfinite(self.loss)

    def at(self, step: int, column: Literal["loss", "lr", "grad_norm", "scale"]) -> float:
        """A number of one step; NaN where no such step is."""
        (found,) = np.nonzero(self.step == step)
        return float(getattr(self, column)[found[0]]) if len(found) else math.nan


NO_HISTORY = History(*(np.zeros(0, kind) for kind in (np.int64, *[np.float64] * 4, np.bool_)))


@dataclass(frozen=True)
class Sample:
    """`layers.jsonl` of one sampled step."""

    step: int
    rows: tuple[LayerRecord, ...]

    def of(self, tensor: str) -> list[LayerRecord]:
        """Rows of one kind: `output`, `grad_output`, `weight`, `grad` or `update`."""
        return [row for row in self.rows if row.tensor == tensor]


@dataclass(frozen=True)
class Evidence:
    """Facts of one place, whole: what `facts` shows the newest of, all of it is here.

    Attributes:
        recipe: of a run of ours, or the one named beside a checkpoint.
        plan: of the run's newest attempt.
        samples: by rising step.
        events: of a loop that is not ours.
        replay: a step that was run again, if one was.
    """

    facts: Facts
    recipe: Recipe | None = None
    plan: Plan | None = None
    history: History = NO_HISTORY
    samples: tuple[Sample, ...] = ()
    evaluations: tuple[EvalRecord, ...] = ()
    events: tuple[LoopRecord, ...] = field(default=())
    replay: Replay | None = None

    @property
    def foreign(self) -> ForeignRun | None:
        """What a recorder says of a loop that is not ours."""
        return self.facts.run.foreign if self.facts.run else None

    @property
    def is_foreign(self) -> bool:
        """Whether a recorder wrote it in a loop that is not ours."""
        return self.foreign is not None

    @property
    def is_trainer(self) -> bool:
        """Whether that loop is the Hugging Face Trainer's."""
        return self.foreign is not None and self.foreign.loop == "transformers"

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is multiplied by anything but 1."""
        return bool((self.history.scale != 1).any())

    @property
    def compute(self) -> str:
        """The format of products: `fp32`, `tf32`, `fp16` or `bf16`, or `-` where it is not known.

        Of a run of ours the recipe says it; of a foreign one what its modules did in step 1.
        """
        if self.recipe:
            return self.recipe.precision.mode.partition("-")[0]
        types = self.facts.run.types.values() if self.facts.run else ()
        computed = {part for seen in types for part in seen.computed.split("+")}
        return next((half for half in ("fp16", "bf16", "fp32") if half in computed), "-")
