"""A data set whose two splits are tensors in memory: the simplest way to bring one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mpcli.data.batch import Batch
from mpcli.data.order import EpochOrder


class TensorDataset:
    """Named tensors, shuffled for each epoch; every sample weighs 1.

    Args:
        train: name -> tensor; the first dimension counts the samples.
        eval: the same names; evaluated in this order.
        source: where they come from, in words.
        info: what `build_model` has to know.

    Raises:
        ValueError: the splits differ in names or types, or tensors of one split in length.
    """

    def __init__(
        self,
        train: Mapping[str, Tensor],
        eval: Mapping[str, Tensor],
        *,
        source: str,
        info: Any = None,
    ) -> None:
        lengths = [sorted({len(tensor) for tensor in split.values()}) for split in (train, eval)]
        for name, length in zip(("train", "eval"), lengths, strict=True):
            if len(length) != 1 or not length[0]:
                raise ValueError(f"`{name}` needs tensors of one length, found {length}")
        about = [{name: (t.dtype, t.shape[1:]) for name, t in s.items()} for s in (train, eval)]
        if about[0] != about[1]:
            raise ValueError(f"`train` has {about[0]}, and `eval` {about[1]}")
        self.num_train, self.num_eval = lengths[0][0], lengths[1][0]
        self.source = source
        self.info = info
        self._train, self._eval = dict(train), dict(eval)

    def example(self, num_samples: int) -> Batch:
        """A batch of zeros."""
        tensors = self._train.items()
        return Batch({name: t.new_zeros(num_samples, *t.shape[1:]) for name, t in tensors})

    def prepare(self, device: torch.device) -> None:
        """Move everything to `device`."""
        for split in (self._train, self._eval):
            split.update({name: tensor.to(device) for name, tensor in split.items()})
        self._order = EpochOrder(self.num_train, device)

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The global batch of an attempted step (from 0): a function of the arguments alone."""
        chosen = self._order.chosen(seed, step, batch_size)
        return Batch({name: t.index_select(0, chosen) for name, t in self._train.items()})

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The evaluation split in its own order; the last batch may be smaller."""
        for start in range(0, self.num_eval, batch_size):
            yield Batch({name: t[start : start + batch_size] for name, t in self._eval.items()})
