"""What a run keeps so that it can be explained: sampled steps, and the steps that went wrong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.workers import TrainBatches
from mpcli.engines.base import Engine, LossFunction, Outcome
from mpcli.engines.shadow import Shadow
from mpcli.flight import keep_flight
from mpcli.precision.numerics import numerics
from mpcli.precision.statistics import Pending
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.recipe import Recipe
from mpcli.records import FlightRecord, LayerRecord, StepRecord
from mpcli.rundir import RunDirectory


class Evidence:
    """The probe and the flight recorder of one attempt. Neither changes what is computed.

    With several ranks, activations and random states are rank 0's; weights, gradients and updates
    are those of all.

    Args:
        data: where the batch of a step that went wrong is had from once more.
        build_model: a fresh fp32 model on the device, for shadows.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        engine: Engine,
        data: TrainBatches,
        device: torch.device,
        build_model: Callable[[], nn.Module],
        ranks: Ranks = ALONE,
    ) -> None:
        self._recipe = recipe
        self._run = run
        self._engine = engine
        self._data = data
        self._ranks = ranks
        self._is_half = numerics(recipe.precision.mode).compute != torch.float32
        self._shadow = Shadow(build_model, device, ranks)
        self._random: dict[int, dict[str, Tensor]] = {}  # before the steps that have no row yet
        self._copying: deque[tuple[int, Pending]] = deque()
        self._newest: list[LayerRecord] = []

    def before_step(
        self, step: int, loss_function: LossFunction, batches: Sequence[Batch], total_weight: int
    ) -> None:
        """Note the random state, and prepare to look at the step if it is to be sampled.

        Args:
            batches: this rank's micro-batches, on the device.
        """
        self._random[step] = self._engine.random_state()
        probe = self._recipe.probe
        if _due(probe.every, step) or step in probe.steps:
            beside = None
            if _due(probe.shadow_every, step) or (self._is_half and step in probe.steps):
                weights = self._engine.weights()
                beside = self._shadow.samples(weights, loss_function, batches, total_weight)
            self._engine.sample(beside)

    def after_step(self, step: int, outcome: Outcome) -> None:
        """Note the table of a sampled step, which is on its way to the host."""
        if outcome.layers is not None and self._ranks.is_main:
            self._copying.append((step, outcome.layers))

    def add(self, row: StepRecord) -> None:
        """What became of a step: one that went wrong is kept."""
        random_state = self._random.pop(row.step)
        if (row.applied and math.isfinite(row.loss)) or not self._ranks.is_main:
            return
        self.write(row.step, wait=True)
        batch = self._data.train_batch(
            self._recipe.train.seed, row.step - 1, self._recipe.train.global_batch_size
        )
        about = FlightRecord.of(row, weights=batch.weights)
        keep_flight(self._run, about, batch.tensors, random_state, self._newest)

    def write(self, up_to: int, *, wait: bool = False) -> None:
        """Write the tables of the steps `up_to`; without `wait` those that are on the host."""
        while self._copying and self._copying[0][0] <= up_to:
            step, layers = self._copying[0]
            table = layers.records(step, self._run.attempt, wait=wait)
            if table is None:
                return
            self._run.append_layers(table)
            self._newest = table
            self._copying.popleft()

    def go_back(self) -> None:
        """Forget the steps that have no row: they will be as if they never had been."""
        self._random.clear()
        self._copying.clear()


def _due(every: int, step: int) -> bool:
    """The first step, and every N-th."""
    return every > 0 and (step == 1 or step % every == 0)
