"""Dynamic masking: which tokens a masked language model has to guess, drawn for each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpcli.data.batch import Batch
from mpcli.data.text.tokenizer import CONTINUES
from mpcli.recipe.errors import user_error

IGNORED = -100
"""The label of nothing to guess."""


class Masking:
    """Chooses tokens, and hides 80% of them, replaces 10% by any others and keeps 10%.

    Devlin et al., BERT, 2019. Special tokens are not chosen. Of every sequence one token (or word)
    at least is.

    Args:
        tokenizer: of transformers, with a mask token.
        probability: of a token (or word) to be chosen.
        whole_word: choose words, with all their tokens; what becomes of a token is drawn for
            each.

    Raises:
        UserError: the tokenizer has no mask token; or no WordPiece, from which words are told.
    """

    def __init__(self, tokenizer: Any, probability: float, *, whole_word: bool) -> None:
        if tokenizer.mask_token_id is None:
            raise user_error(
                "the tokenizer has no mask token",
                "use that of a masked language model, or `tokenizer: {kind: wordpiece}`",
                path="data.tokenizer",
            )
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self._continues = torch.tensor([name.startswith(CONTINUES) for name in names])
        if whole_word and not self._continues.any():
            raise user_error(
                "words can be told only from a WordPiece vocabulary",
                "use another tokenizer, or `whole_word: false`",
                path="task.whole_word",
            )
        self._special = torch.zeros(len(names), dtype=torch.bool)
        self._special[tokenizer.all_special_ids] = True
        self._mask_token: int = tokenizer.mask_token_id
        self._probability = probability
        self._whole_word = whole_word

    def __call__(self, sequences: Tensor, generator: torch.Generator) -> Batch:
        """Draw the tokens to guess.

        Args:
            sequences: [N, length] int64.

        Returns:
            `input_ids` [N, length]; `positions` [N, K] of the tokens to guess and their `labels`,
            `IGNORED` where a sequence has fewer than K. Weights are the numbers of such tokens.
        """
        chosen = self._choose(sequences, generator)
        counts = chosen.sum(1)
        # The chosen positions first, in their order.
        positions = chosen.logical_not().sort(dim=1, stable=True).indices[:, : int(counts.max())]
        labels = sequences.gather(1, positions)
        labels[~chosen.gather(1, positions)] = IGNORED
        tensors = {
            "input_ids": self._hide(sequences, chosen, generator),
            "positions": positions.contiguous(),
            "labels": labels,
        }
        return Batch(tensors, tuple(counts.tolist()))

    def _choose(self, sequences: Tensor, generator: torch.Generator) -> Tensor:
        draws = torch.rand(sequences.shape, generator=generator)
        if self._whole_word:  # all tokens of a word have the draw of its first one
            begins = ~self._continues[sequences]
            begins[:, 0] = True
            draws = draws.gather(1, begins.long().cumsum(1) - 1)
        draws = draws.masked_fill(self._special[sequences], 2.0)
        lowest = draws.amin(1, keepdim=True)
        return (draws < self._probability) | ((draws == lowest) & (lowest < 2.0))

    def _hide(self, sequences: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
        fate = torch.rand(sequences.shape, generator=generator)
        others = torch.randint(len(self._special), sequences.shape, generator=generator)
        hidden = torch.where(chosen & (fate < 0.8), self._mask_token, sequences)
        return torch.where(chosen & (fate >= 0.9), others, hidden)
