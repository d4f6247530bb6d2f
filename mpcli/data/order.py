"""Which samples a training step sees."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcli.data.seeds import derive_seed


class EpochOrder:
    """A fresh permutation of the training split for every epoch, whose incomplete batch is dropped.

    Args:
        num_train: samples of the split.
        device: where the indices are.
    """

    def __init__(self, num_train: int, device: torch.device) -> None:
        self.num_train = num_train
        self._device = device
        self._generator = torch.Generator()
        self._shuffled: tuple[tuple[int, int], Tensor] | None = None

    def chosen(self, seed: int, step: int, batch_size: int) -> Tensor:
        """Indices of a step's samples: a function of the arguments alone.

        Args:
            seed: of the run.
            step: attempted steps before this one, from 0.
            batch_size: at most `num_train`.

        Returns:
            [batch_size] int64.
        """
        epoch, position = divmod(step, self.num_train // batch_size)
        return self._order(seed, epoch)[position * batch_size : (position + 1) * batch_size]

    def _order(self, seed: int, epoch: int) -> Tensor:
        if self._shuffled is None or self._shuffled[0] != (seed, epoch):
            self._generator.manual_seed(derive_seed(seed, "order", epoch))
            order = torch.randperm(self.num_train, generator=self._generator)
            self._shuffled = (seed, epoch), order.to(self._device)
        return self._shuffled[1]
