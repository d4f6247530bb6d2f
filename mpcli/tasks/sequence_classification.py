"""One label for a text, or for two texts that are compared."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.text import LabelledText, TextInfo, tokenised
from mpcli.recipe.data import TextData
from mpcli.recipe.task import SequenceClassification
from mpcli.tasks import transformers_models

Options = SequenceClassification


def load_data(options: Options, data: TextData) -> LabelledText:
    """The labelled texts as tokens on disk.

    Raises:
        UserError: exit 3, the texts or the tokenizer cannot be had; exit 2, they do not fit.
    """
    tokenizer = transformers_models.tokenizer_options(options, data)
    return LabelledText(tokenised(data, tokenizer, labels=True))


def build_model(options: Options, info: TextInfo) -> nn.Module:
    """Any `AutoModelForSequenceClassification`; its head is fresh where weights lack one.

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    return transformers_models.build("AutoModelForSequenceClassification", options, info)


def loss(options: Options, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy, summed over the texts in fp32, and their number."""
    return F.cross_entropy(_logits(model, batch), batch["labels"], reduction="sum"), batch.weight


def evaluate(options: Options, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross-entropy, accuracy (0..1) and F1: of label 1 of two, else the mean over labels."""
    num_texts = 0
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    for batch in batches:
        logits, labels = _logits(model, batch), batch["labels"]
        num_labels = logits.shape[1]
        losses.append(F.cross_entropy(logits, labels, reduction="sum").double())
        cells = labels * num_labels + logits.argmax(1)
        counts.append(torch.bincount(cells, minlength=num_labels**2))
        num_texts += batch.weight
    confusion = torch.stack(counts).sum(0).view(num_labels, num_labels)  # [true, guessed]
    correct = confusion.diagonal().double()
    f1 = 2 * correct / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    loss_sum, num_correct, mean_f1 = torch.stack(
        (torch.stack(losses).sum(), correct.sum(), f1[1] if num_labels == 2 else f1.mean())
    ).tolist()
    return {"loss": loss_sum / num_texts, "accuracy": num_correct / num_texts, "f1": mean_f1}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """fp32 [N, labels]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    takes_types = "token_type_ids" in inspect.signature(type(model).forward).parameters
    # GPT-2 would take them for words, and some of RoBERTa's kin know a single type.
    if takes_types and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch["token_type_ids"]
    logits: Tensor = model(**inputs).logits
    return logits.float()
