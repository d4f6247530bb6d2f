"""Text packed into sequences of one length, without padding: what language models learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpcli.data.batch import Batch
from mpcli.data.order import EpochOrder
from mpcli.data.seeds import derive_seed
from mpcli.data.text.tokens import TextInfo, Tokens
from mpcli.recipe.errors import Problem, UserError

_EVAL_CHUNK = 64  # sequences whose evaluation batch is made with one generator

Collate = Callable[[Tensor, torch.Generator], Batch]
"""(sequences [N, length] int64, random numbers) -> what a model learns from them; on the CPU."""


class PackedText:
    """Sequences cut from one stream of tokens; a last, shorter one is left out.

    Args:
        tokens: without labels.
        collate: makes the batches. Evaluation batches are made with the same random numbers each
            time, whatever their size.
        prefix: special tokens that every sequence begins with.
        suffix: special tokens that every sequence ends with.

    Raises:
        UserError: a split is shorter than a sequence.
    """

    def __init__(
        self,
        tokens: Tokens,
        collate: Collate,
        *,
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
    ) -> None:
        self.info: TextInfo = tokens.info
        self.source = tokens.source
        self._collate = collate
        self._prefix, self._suffix = prefix, suffix
        self._own = tokens.info.sequence_length - len(prefix) - len(suffix)
        self._train, self._eval = tokens.arrays["train.tokens"], tokens.arrays["eval.tokens"]
        self.num_train, self.num_eval = len(self._train) // self._own, len(self._eval) // self._own
        problems = [
            Problem(
                f"the {name} text has {len(stream)} tokens, and a sequence {self._own}",
                "use shorter sequences or more text; `data.eval_path` names held-out text",
                path="data.sequence_length",
            )
            for name, stream in (("training", self._train), ("held-out", self._eval))
            if len(stream) < self._own
        ]
        if problems:
            raise UserError(*problems)
        self._generator = torch.Generator()
        self._order = EpochOrder(self.num_train, torch.device("cpu"))
        self._device = torch.device("cpu")

    def example(self, num_samples: int) -> Batch:
        """A batch of the first training sequence."""
        sequences = self._sequences(self._train, torch.zeros(num_samples, dtype=torch.int64))
        return self._collate(sequences, torch.Generator())

    def prepare(self, device: torch.device) -> None:
        """Batches are on `device` from now on; the tokens stay on the disk."""
        self._device = device

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The global batch of an attempted step (from 0): a function of the arguments alone."""
        sequences = self._sequences(self._train, self._order.chosen(seed, step, batch_size))
        self._generator.manual_seed(derive_seed(seed, "collate", step))
        return self._collate(sequences, self._generator).to(self._device)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The held-out sequences in their order."""
        for chunk, numbers in enumerate(torch.arange(self.num_eval).split(_EVAL_CHUNK)):
            self._generator.manual_seed(derive_seed(0, "evaluate", chunk))
            batch = self._collate(self._sequences(self._eval, numbers), self._generator)
            yield from (part.to(self._device) for part in batch.split(batch_size))

    def _sequences(self, stream: NDArray[np.int32], numbers: Tensor) -> Tensor:
        """[N, length] int64."""
        places = numbers.numpy()[:, None] * self._own + np.arange(self._own)
        sequences = np.empty((len(numbers), self.info.sequence_length), np.int64)
        end = len(self._prefix) + self._own
        sequences[:, : len(self._prefix)] = self._prefix
        sequences[:, len(self._prefix) : end] = stream[places]
        sequences[:, end:] = self._suffix
        return torch.from_numpy(sequences)
