"""What a task is: a module, or a user's file, with exactly these five names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.recipe.base import Section


class Dataset(Protocol):
    """Both splits: described at once, read by `prepare`."""

    @property
    def num_train(self) -> int:
        """Samples to learn from."""

    @property
    def num_eval(self) -> int:
        """Samples to evaluate on."""

    @property
    def source(self) -> str:
        """Where the samples come from, in words."""

    @property
    def info(self) -> Any:
        """What `build_model` has to know: the number of classes, say."""

    def example(self, num_samples: int) -> Batch:
        """A batch on the CPU of the right shapes and types, whatever its values; cheap.

        It has none of the data: the plan looks at it before anything is read.
        """

    def prepare(self, device: torch.device) -> None:
        """Read everything; batches are on `device` from now on.

        Raises:
            UserError: exit 3, when the data is missing or damaged.
        """

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The global batch of an attempted step (from 0): a function of the arguments alone."""

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The evaluation split once, in a fixed order; the last batch may be smaller."""


class Task(Protocol):
    """What the plan and the trainer ask of a task. `options` are an instance of `Options`."""

    @property
    def Options(self) -> type[Section]:
        """The schema of the recipe's `task` section."""

    def load_data(self, options: Any, data: Any) -> Dataset:
        """The data set of the recipe's `data` section, described but not read.

        Raises:
            UserError: exit 3, when it cannot be had.
        """

    def build_model(self, options: Any, info: Any) -> nn.Module:
        """Fresh weights on torch's default device.

        Raises:
            UserError: there is no such model.
        """

    def loss(self, options: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The fp32 sum of the losses, and how many they are: `batch.weight`."""

    def evaluate(
        self, options: Any, model: nn.Module, batches: Iterable[Batch]
    ) -> dict[str, float]:
        """Metrics over all batches, the mean `loss` among them, with one host read at the end.

        The model is in evaluation mode, and gradients are off.
        """
