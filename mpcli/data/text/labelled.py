"""Texts with labels: sequences of different lengths, padded to the longest of their batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mpcli.data.batch import Batch
from mpcli.data.order import EpochOrder
from mpcli.data.text.records import Split
from mpcli.data.text.tokenizer import padding
from mpcli.data.text.tokens import Tokens

_MULTIPLE = 8  # lengths that tensor cores like, and fewer different shapes


class LabelledText:
    """One label for a sequence.

    Batches have `input_ids`, `attention_mask`, `token_type_ids` [N, longest] and `labels` [N], all
    int64.

    Args:
        tokens: with labels.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.info = tokens.info
        self.source = tokens.source
        self._arrays = tokens.arrays
        self.num_train = len(tokens.arrays["train.labels"])
        self.num_eval = len(tokens.arrays["eval.labels"])
        self._padding = padding(self.info.tokenizer)
        self._ends = {
            split: np.cumsum(tokens.arrays[f"{split}.lengths"], dtype=np.int64)
            for split in ("train", "eval")
        }
        self._order = EpochOrder(self.num_train, torch.device("cpu"))
        self._device = torch.device("cpu")

    def example(self, num_samples: int) -> Batch:
        """A batch of the first training sequence."""
        return self._batch("train", np.zeros(num_samples, np.int64))

    def prepare(self, device: torch.device) -> None:
        """Batches are on `device` from now on; the tokens stay on the disk."""
        self._device = device

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The global batch of an attempted step (from 0): a function of the arguments alone."""
        chosen = self._order.chosen(seed, step, batch_size)
        return self._batch("train", chosen.numpy()).to(self._device)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The evaluation split in its own order; the last batch may be smaller."""
        for start in range(0, self.num_eval, batch_size):
            rows = np.arange(start, min(start + batch_size, self.num_eval))
            yield self._batch("eval", rows).to(self._device)

    def _batch(self, split: Split, rows: NDArray[np.int64]) -> Batch:
        lengths = self._arrays[f"{split}.lengths"][rows]
        ends = self._ends[split][rows]
        longest = -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE
        shape = (len(rows), min(longest, self.info.sequence_length))
        ids, types = np.full(shape, self._padding), np.zeros(shape, np.int64)
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            ids[row, :length] = self._arrays[f"{split}.tokens"][end - length : end]
            types[row, :length] = self._arrays[f"{split}.types"][end - length : end]
        mask = np.arange(shape[1]) < lengths[:, None]
        columns = {
            "input_ids": ids,
            "attention_mask": mask.astype(np.int64),
            "token_type_ids": types,
            "labels": self._arrays[f"{split}.labels"][rows].astype(np.int64),
        }
        return Batch({name: torch.from_numpy(values) for name, values in columns.items()})
