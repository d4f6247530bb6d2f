"""Causal language modelling: guess the next token of packed text (Radford et al., GPT-2, 2019)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.text import PackedText, TextInfo, tokenised
from mpcli.recipe.data import TextData
from mpcli.recipe.errors import user_error
from mpcli.recipe.task import CausalLm
from mpcli.tasks import transformers_models
from mpcli.tasks.perplexity import perplexity

Options = CausalLm


def load_data(options: Options, data: TextData) -> PackedText:
    """The text as tokens on disk.

    Raises:
        UserError: exit 3, the text or the tokenizer cannot be had; exit 2, they do not fit.
    """
    tokens = tokenised(data, transformers_models.tokenizer_options(options, data))
    return PackedText(tokens, _collate)


def _collate(sequences: Tensor, generator: torch.Generator) -> Batch:
    """Every token but the first of a sequence is guessed."""
    count, length = sequences.shape
    return Batch({"input_ids": sequences}, (length - 1,) * count)


def build_model(options: Options, info: TextInfo) -> nn.Module:
    """Any `AutoModelForCausalLM`; encoders, such as BERT, become decoders.

    Raises:
        UserError: there is no such model, its weights cannot be had, or it sees later tokens.
    """
    model = transformers_models.build("AutoModelForCausalLM", options, info)
    if torch.get_default_device().type != "meta":
        _check_causal(model, info)
    return model


def _check_causal(model: nn.Module, info: TextInfo) -> None:
    """Such classes hold models that see what they have to guess, which only weights can show."""
    texts = torch.arange(min(info.sequence_length, 16)).remainder(len(info.tokenizer)).repeat(2, 1)
    texts[1, -1] = 0
    with torch.no_grad():
        one, other = _logits(model.eval(), texts)
    model.train()
    if (one - other).abs().max() > 1e-4 * one.abs().max():
        raise user_error(
            "this model sees the tokens that it has to guess",
            "use a decoder, such as `gpt2`; or `kind: masked-lm`",
            path="task.model",
        )


def loss(options: Options, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy, summed over the guessed tokens in fp32, and their number."""
    tokens = batch["input_ids"]
    logits = _logits(model, tokens).flatten(0, 1)
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"), batch.weight


def evaluate(options: Options, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross-entropy and its perplexity."""
    num_tokens = 0
    sums: list[Tensor] = []
    for batch in batches:
        loss_sum, weight = loss(options, model, batch)
        sums.append(loss_sum.double())
        num_tokens += weight
    mean = torch.stack(sums).sum().item() / num_tokens
    return {"loss": mean, "perplexity": perplexity(mean)}


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """fp32 [N, length - 1, vocabulary]: none at the last token, after which nothing is guessed."""
    # Without a cache, transformers reads positions on the host to see whether sequences are packed
    # as it does it. A cache that nobody fills before or reads after changes no number.
    logits: Tensor = model(input_ids=tokens, use_cache=True).logits
    return logits[:, :-1].float()
