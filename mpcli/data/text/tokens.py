"""Text as tokens: tokenised once, and memory-mapped from the cache from then on."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any, assert_never

import numpy as np

from mpcli.data.cache import content_key
from mpcli.data.store import Arrays, Writer, stored
from mpcli.data.text import plain, tables, tokenizer
from mpcli.data.text.records import Damage, Record, Source, Split, no_data
from mpcli.recipe.data import Datasets, PretrainedTokenizer, Text, TextData, Tokenizer, WordPiece
from mpcli.recipe.errors import user_error

_log = logging.getLogger(__name__)
_FORMAT = 2  # of the cache: another number when the same records give other arrays
_SPLITS: tuple[Split, ...] = ("train", "eval")
_CHUNK = 512  # records that are tokenised together, in threads
_GAPS_FROM = 1000  # labels: fewer may have numbers between them that none has


@dataclass(frozen=True)
class TextInfo:
    """What a model and its readers have to know of the text that it learns from.

    Attributes:
        tokenizer: of transformers.
        sequence_length: tokens of a sequence, at most.
        num_labels: 0 where records have none.
        label_names: of the classes, by number, where the data has names.
    """

    tokenizer: Any
    sequence_length: int
    num_labels: int = 0
    label_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Both splits as tokens.

    Attributes:
        arrays: `<split>.tokens` one after another. With labels, for each record `<split>.lengths`
            and `<split>.labels`, and for each token `<split>.types`: 0, or 1 in the second text.
        source: where they come from, in words.
    """

    arrays: Arrays
    info: TextInfo
    source: str


def tokenised(data: TextData, options: Tokenizer, *, labels: bool = False) -> Tokens:
    """The tokens of a data set, from the cache where they are in it.

    Without labels there are no special tokens, except one that separates documents where the
    tokenizer has any such. With labels every record is a sequence of its own, with its special
    tokens, cut to `data.sequence_length`.

    Raises:
        UserError: exit 3, the data or the tokenizer cannot be had, a record cannot be decoded, or
            there is nothing to learn from labels; exit 7, the cache cannot be written.
    """
    source = _find(data, labels)
    loaded: Any = None
    if isinstance(options, PretrainedTokenizer):
        loaded = tokenizer.load(options)
        if tokenizer.is_empty(loaded):
            what = f"{options.path or options.hub} has no `tokenizer.json`, or an empty one"
            raise no_data(what, "use `tokenizer: {kind: wordpiece}`", "data.tokenizer")

    def make(writer: Writer) -> dict[str, Any]:
        for split in _SPLITS if _has_held_out(data) else _SPLITS[:1]:
            damage = Damage(data.on_error)
            if not any(text.strip() for text in _texts(source, split, damage)):
                what = f"the split for {split} of the data holds no text: {source.about}"
                raise no_data(what, f"skipped: {damage.first}" if damage.skipped else None)
        made = loaded
        if isinstance(options, WordPiece):
            made = tokenizer.learnt(options, lambda: _texts(source, "train", Damage(data.on_error)))
        damage = Damage(data.on_error)
        for split in _SPLITS:
            records = _readable(source.read(split, damage))
            if labels:
                _write_labelled(writer, split, records, made, data)
            else:
                _write_stream(writer, split, records, made)
        return {
            "tokenizer": None if loaded else made.backend_tokenizer.to_str(),
            "label_names": source.label_names(),
            "skipped": damage.skipped,
            "first": damage.first,
        }

    arrays, facts = stored(_key(data, options, loaded, source, labels), make)
    about = source.about
    if facts["skipped"]:
        about += f", without {facts['skipped']} records that cannot be decoded"
        _log.warning("%d records are skipped; %s", facts["skipped"], facts["first"])
    info = TextInfo(
        loaded or tokenizer.restored(facts["tokenizer"]),
        data.sequence_length,
        _num_labels(arrays, facts["label_names"], data) if labels else 0,
        tuple(facts["label_names"]),
    )
    return Tokens(arrays, info, about)


def _num_labels(arrays: Arrays, names: Sequence[str], data: TextData) -> int:
    """How many outputs a classifier needs; a warning tells of labels that it cannot learn."""
    if isinstance(data, Datasets) and data.label_names is not None:
        return len(data.label_names)
    train, held_out = (np.unique(arrays[f"{split}.labels"]).tolist() for split in _SPLITS)
    path = "data.label_column"
    if len(train) < 2:
        what = f"all records for training have the label {names[train[0]] if names else train[0]}"
        raise no_data(what, "a classifier needs two labels at least; name their column", path)
    if unseen := [label for label in held_out if label not in train]:
        _log.warning("labels that only the held-out split has: %s", unseen[:8])
    num_labels = len(names) or max(*train, *held_out) + 1
    different = len(train) + len(unseen)
    if num_labels > max(_GAPS_FROM, 2 * different):
        what = f"the largest label is {num_labels - 1:,}, and there are {different:,} different"
        raise no_data(what, "number them from 0 without gaps, or name the classes by words", path)
    return num_labels


def _has_held_out(data: TextData) -> bool:
    """Text of its own, that is: not a part of the other."""
    return not isinstance(data, Text) or data.eval_path is not None


def _find(data: TextData, labels: bool) -> Source:
    match data:
        case Text():
            return plain.find(data)
        case Datasets():
            if len(data.text_columns) > 1 and not labels:
                raise user_error(
                    "a language model learns from one column of text",
                    f"use `[{data.text_columns[0]}]`",
                    path="data.text_columns",
                )
            return tables.find(data, labels=labels)
        case _:
            assert_never(data)


def _key(data: TextData, options: Tokenizer, loaded: Any, source: Source, labels: bool) -> str:
    """Changes with everything that the arrays follow from, except the names of files."""
    used = (loaded.sep_token_id, loaded.eos_token_id, loaded.pad_token_id) if loaded else ()
    how = {
        "format": (_FORMAT, version("tokenizers")),
        "data": data.model_dump(exclude={"path", "eval_path", "tokenizer"}),
        "local": data.path is not None,  # the embedded text is not read like a file of text
        "files": [[path.suffix for path in source.files[split]] for split in _SPLITS],
        "tokenizer": loaded.backend_tokenizer.to_str() if loaded else options.model_dump(),
        "special": used,
        "labels": labels,
    }
    with _reading():
        return content_key(json.dumps(how), (*source.files["train"], *source.files["eval"]))


def _texts(source: Source, split: Split, damage: Damage) -> Iterator[str]:
    for record in _readable(source.read(split, damage)):
        yield from record.texts


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise no_data(f"{error.filename}: {error.strerror}") from error


def _readable(records: Iterator[Record]) -> Iterator[Record]:
    """The records; a file that cannot be read is missing data, not a bug."""
    with _reading():
        yield from records


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(records, _CHUNK)):
        yield chunk


def _write_stream(writer: Writer, split: Split, records: Iterator[Record], made: Any) -> None:
    separator = made.sep_token_id if made.sep_token_id is not None else made.eos_token_id
    end = [] if separator is None else [separator]
    writer.append(f"{split}.tokens", np.zeros(0, np.int32))  # there, though it may stay empty
    for chunk in _chunks(records):
        encoded = made.backend_tokenizer.encode_batch(
            [record.texts[0] for record in chunk], add_special_tokens=False
        )
        for record, encoding in zip(chunk, encoded, strict=True):
            tokens = encoding.ids + (end if record.ends else [])
            writer.append(f"{split}.tokens", np.asarray(tokens, np.int32))


def _write_labelled(
    writer: Writer, split: Split, records: Iterator[Record], made: Any, data: TextData
) -> None:
    padding = [tokenizer.padding(made)]  # of a text without any token, which no model takes
    backend = made.backend_tokenizer.from_str(made.backend_tokenizer.to_str())  # a copy
    backend.enable_truncation(data.sequence_length)
    backend.no_padding()
    for chunk in _chunks(records):
        texts = [record.texts if len(record.texts) > 1 else record.texts[0] for record in chunk]
        encoded = backend.encode_batch(texts)
        columns = {
            "tokens": [token for encoding in encoded for token in encoding.ids or padding],
            "types": [kind for encoding in encoded for kind in encoding.type_ids or [0]],
            "lengths": [max(1, len(encoding.ids)) for encoding in encoded],
            "labels": [record.label for record in chunk],
        }
        for name, values in columns.items():
            writer.append(f"{split}.{name}", np.asarray(values, np.int32))
