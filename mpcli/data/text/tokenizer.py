"""Tokenizers: a WordPiece vocabulary learnt from a text, or one that is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mpcli.data.cache import expand
from mpcli.recipe.data import PretrainedTokenizer, WordPiece
from mpcli.recipe.errors import Exit, user_error
from mpcli.signals import uninterrupted

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""As BERT calls them; their numbers are those of this order."""
CONTINUES = "##"
"""What a token begins with that continues a word."""


def learnt(options: WordPiece, texts: Callable[[], Iterator[str]]) -> Any:
    """A tokenizer of transformers learnt from texts: the same from the same texts, bit for bit.

    Args:
        texts: begins to read them; called twice.

    Raises:
        UserError: the vocabulary is too small for the text's characters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    def tokenizer(model: Any) -> Any:
        made = Tokenizer(model)
        made.normalizer = normalizers.BertNormalizer(lowercase=options.lowercase)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return made

    # The trainer breaks ties between equally frequent pairs by the numbers of their parts, and
    # numbers the characters in the order of a hash table, which differs from run to run. So the
    # characters are collected first, and have their numbers before it begins.
    characters = _train(tokenizer(models.WordPiece(unk_token="[UNK]")), texts(), [], 0)
    fixed = [*SPECIAL.values(), *sorted(characters)]
    if len(fixed) > options.vocab_size:
        raise user_error(
            f"{options.vocab_size} entries cannot hold the {len(fixed)} of single characters",
            f"use {len(fixed)} at the very least",
            path="data.tokenizer.vocab_size",
        )
    vocabulary = _train(
        tokenizer(models.WordPiece(unk_token="[UNK]")), texts(), fixed, options.vocab_size
    )
    # Built anew: for the trainer the characters were special tokens.
    made = tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.add_special_tokens(list(SPECIAL.values()))
    made.decoder = decoders.WordPiece(prefix=CONTINUES)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    return _wrapped(made)


def restored(text: str) -> Any:
    """A tokenizer that was learnt, from its JSON."""
    from tokenizers import Tokenizer

    return _wrapped(Tokenizer.from_str(text))


def _train(tokenizer: Any, texts: Iterator[str], fixed: list[str], size: int) -> dict[str, int]:
    from tokenizers import trainers

    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=fixed,
        continuing_subword_prefix=CONTINUES,
        limit_alphabet=2**20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return vocabulary


def _wrapped(tokenizer: Any) -> Any:
    with uninterrupted():
        from transformers import PreTrainedTokenizerFast

    made: Any = PreTrainedTokenizerFast  # untyped
    return made(tokenizer_object=tokenizer, **SPECIAL)


def padding(tokenizer: Any) -> int:
    """The number of what follows the shorter sequences of a batch.

    Raises:
        UserError: the tokenizer has neither a padding token nor one for the end of a text.
    """
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    raise user_error(
        "the tokenizer has neither a padding token nor one for the end of a text",
        "give its `tokenizer_config.json` a `pad_token`, or use `tokenizer: {kind: wordpiece}`",
        path="data.tokenizer",
    )


def load(options: PretrainedTokenizer) -> Any:
    """A fast tokenizer of transformers. Code that comes with one is never run.

    Raises:
        UserError: exit 3, there is none.
    """
    with uninterrupted():
        from transformers import AutoTokenizer

    place = str(expand(options.path)) if options.path is not None else options.hub
    path = "data.tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # whatever the network, the hub or damaged files lead to
        reason = str(error).strip().splitlines()[0]
        raise user_error(
            f"no tokenizer can be had from {place}: {reason}",
            "name a folder that holds `tokenizer.json` and `tokenizer_config.json`, or use "
            "`tokenizer: {kind: wordpiece}`",
            path=path,
            exit_code=Exit.ENVIRONMENT,
        ) from error
    if not tokenizer.is_fast:
        what = f"the tokenizer of {place} has no `tokenizer.json`"
        raise user_error(what, "convert it with transformers, or choose another", path=path)
    return tokenizer


def is_empty(tokenizer: Any) -> bool:
    """Whether it has no words, as what transformers makes of a folder without a tokenizer."""
    return len(tokenizer) <= len(tokenizer.all_special_ids)
