"""Masked language modelling: guess the hidden tokens of packed text (Devlin et al., BERT, 2019)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.text import IGNORED, Masking, PackedText, TextInfo, tokenised
from mpcli.recipe.data import TextData
from mpcli.recipe.task import MaskedLm
from mpcli.tasks import transformers_models
from mpcli.tasks.perplexity import perplexity

Options = MaskedLm


def load_data(options: Options, data: TextData) -> PackedText:
    """The text as tokens on disk, in sequences with the special tokens of a single text.

    Raises:
        UserError: exit 3, the text or the tokenizer cannot be had; exit 2, they do not fit.
    """
    tokens = tokenised(data, transformers_models.tokenizer_options(options, data))
    tokenizer = tokens.info.tokenizer
    masking = Masking(tokenizer, options.mask_probability, whole_word=options.whole_word)
    around = tuple(tokenizer.backend_tokenizer.encode("").ids)  # [CLS] [SEP]
    return PackedText(tokens, masking, prefix=around[:1], suffix=around[1:])


def build_model(options: Options, info: TextInfo) -> nn.Module:
    """Any `AutoModelForMaskedLM`.

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    return transformers_models.build("AutoModelForMaskedLM", options, info)


def loss(options: Options, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy, summed over the hidden tokens in fp32, and their number."""
    return _loss_sum(_logits(model, batch), batch["labels"]), batch.weight


def evaluate(options: Options, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross-entropy, its perplexity, and the share of hidden tokens that are guessed."""
    num_hidden = 0
    sums: list[Tensor] = []
    for batch in batches:
        logits, labels = _logits(model, batch), batch["labels"]
        correct = (logits.argmax(2) == labels).sum()
        sums.append(torch.stack((_loss_sum(logits, labels).double(), correct.double())))
        num_hidden += batch.weight
    loss_sum, num_correct = torch.stack(sums).sum(0).tolist()
    mean = loss_sum / num_hidden
    accuracy = num_correct / num_hidden
    return {"loss": mean, "perplexity": perplexity(mean), "masked_accuracy": accuracy}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """fp32 [N, K, vocabulary], at the tokens to guess: the others' are not worth a softmax."""
    logits: Tensor = model(input_ids=batch["input_ids"]).logits
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows[:, None], batch["positions"]].float()


def _loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED
    )
