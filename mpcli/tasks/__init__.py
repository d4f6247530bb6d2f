"""A task is a module: what is learnt, how its loss is counted, how it is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor, nn

from mpcli.data import DatasetInfo
from mpcli.data.batch import Batch
from mpcli.recipe.data import Data
from mpcli.recipe.task import ImageClassification, Task
from mpcli.tasks import image_classification
from mpcli.tasks.checkpointing import apply_activation_checkpointing

__all__ = ["Dataset", "TaskModule", "apply_activation_checkpointing", "task_module"]


class Dataset(Protocol):
    """Prepared batches on the training device."""

    info: DatasetInfo

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The whole global batch of an attempted step (from 0): a function of the arguments."""

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The evaluation split once, in a fixed order."""


class TaskModule(Protocol):
    """What the trainer and the plan ask of a task."""

    def load_data(self, task: Any, data: Data, device: torch.device) -> Dataset:
        """Both splits on the device. UserError (exit 3) when they cannot be had."""

    def build_model(self, task: Any, info: DatasetInfo) -> nn.Module:
        """Fresh weights on torch's default device. UserError when there is no such model."""

    def check_forward(
        self, task: Any, model: nn.Module, info: DatasetInfo, num_images: int
    ) -> None:
        """UserError when a model of fake tensors cannot take so many examples of the data."""

    def weight(self, batch: Batch) -> int:
        """How many things the loss of a batch sums."""

    def loss(self, task: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The fp32 sum of the losses and its weight."""

    def evaluate(self, task: Any, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics over all batches, with one host read at the end."""


def task_module(task: Task) -> TaskModule:
    """The module that carries out a task."""
    match task:
        case ImageClassification():
            return image_classification
        case _:
            assert_never(task)
