"""From records to tokens on disk, and to batches that follow from (seed, step)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch

from mpcli.data.batch import Batch
from mpcli.data.text import IGNORED, LabelledText, Masking, PackedText, tokenised
from mpcli.data.text.tokenizer import SPECIAL, learnt, load
from mpcli.data.text.tokens import Tokens
from mpcli.recipe.data import Datasets, PretrainedTokenizer, Text, WordPiece
from mpcli.recipe.errors import Exit, UserError

CPU = torch.device("cpu")
WORDPIECE = WordPiece(kind="wordpiece", vocab_size=600)
PAD, UNK, CLS, SEP, MASK = range(5)


def embedded(**fields: Any) -> Tokens:
    return tokenised(Text(kind="text", sequence_length=32, **fields), WORDPIECE)


def packed(**masking: Any) -> PackedText:
    tokens = embedded()
    options = {"probability": 0.15, "whole_word": False, **masking}
    mask = Masking(tokens.info.tokenizer, **options)
    return PackedText(tokens, mask, prefix=(CLS,), suffix=(SEP,))


def labelled(folder: Path, rows: list[str], sequence_length: int = 16) -> Tokens:
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n", "utf-8")
    data = Datasets(kind="datasets", path=str(folder), sequence_length=sequence_length)
    return tokenised(data, WordPiece(kind="wordpiece", vocab_size=100), labels=True)


def same(one: Batch, other: Batch) -> bool:
    return one.weights == other.weights and all(
        torch.equal(tensor, other[name]) for name, tensor in one.tensors.items()
    )


def test_a_learnt_vocabulary_is_the_same_in_every_process() -> None:
    """The trainer's own order follows a hash table that differs from process to process."""
    code = (
        "import hashlib; from mpcli.data.text.tokenizer import learnt;"
        "from mpcli.recipe.data import WordPiece; from pydoc_data.topics import topics;"
        "made = learnt(WordPiece(kind='wordpiece', vocab_size=900), lambda: iter(topics.values()));"
        "print(hashlib.sha256(made.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True) for _ in range(2)]
    assert len(runs[0].stdout) > 60
    assert runs[0].stdout == runs[1].stdout


def test_what_the_vocabulary_can_say() -> None:
    tokenizer = learnt(WORDPIECE, lambda: iter(["A statement is a statement."] * 3))
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL.values())
    ids = tokenizer("Ä statement", "is")["input_ids"]
    assert tokenizer.decode(ids) == "[CLS] a statement [SEP] is [SEP]"
    assert UNK in tokenizer("ж")["input_ids"]


def test_a_vocabulary_that_cannot_hold_the_characters() -> None:
    options = WordPiece(kind="wordpiece", vocab_size=16)
    with pytest.raises(UserError, match=r"16 entries cannot hold the [0-9]+ of single characters"):
        learnt(options, lambda: iter(["abcdefghijklmnopqrstuvwxyz"]))


def test_no_tokenizer_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer can be had from") as caught:
        load(PretrainedTokenizer(kind="pretrained", path=str(tmp_path)))
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    embedded().info.tokenizer.save_pretrained(tmp_path)
    loaded = load(PretrainedTokenizer(kind="pretrained", path=str(tmp_path)))
    text = "The statement, executed."
    assert loaded(text)["input_ids"] == embedded().info.tokenizer(text)["input_ids"]


def test_tokens_come_from_the_cache_until_they_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path))
    first = embedded()
    tokens = np.array(first.arrays["train.tokens"])
    assert isinstance(first.arrays["train.tokens"], np.memmap)
    (folder,) = (tmp_path / "arrays").iterdir()
    made = (folder / "train.tokens.bin").stat().st_mtime_ns

    assert np.array_equal(embedded().arrays["train.tokens"], tokens)
    assert (folder / "train.tokens.bin").stat().st_mtime_ns == made
    with (folder / "train.tokens.bin").open("r+b") as file:
        file.write(b"\xff")
    assert np.array_equal(embedded().arrays["train.tokens"], tokens)
    assert "is damaged and made again" in caplog.text
    (folder / "index.json").write_text("[]")
    assert np.array_equal(embedded().arrays["train.tokens"], tokens)
    assert [path.name for path in (tmp_path / "arrays").iterdir()] == [folder.name]


def test_the_cache_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    data = Text(kind="text", path=str(path), eval_path=str(path))
    path.write_text("one two two two")
    first = tokenised(data, WORDPIECE)
    path.write_text("one two two one")
    second = tokenised(data, WORDPIECE)
    assert not np.array_equal(first.arrays["train.tokens"], second.arrays["train.tokens"])


def test_a_copy_of_the_embedded_text_is_read_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "copy.py").write_bytes(Path(topics.__file__).read_bytes())
    (tmp_path / "copy.txt").write_bytes(Path(topics.__file__).read_bytes())
    copies = [embedded(path=str(tmp_path / name)) for name in ("copy.py", "copy.txt")]
    starts = [
        tokens.info.tokenizer.decode(tokens.arrays["train.tokens"][:40].tolist())
        for tokens in (*copies, embedded())
    ]
    assert starts[0] == starts[1]
    assert starts[0].startswith("#")
    assert starts[2].startswith('the " assert " statement')


def test_the_format_of_a_file_is_in_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "cache"))
    data = Datasets(kind="datasets", path=str(tmp_path), eval_split="train")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    tokenised(data, WORDPIECE, labels=True)
    (tmp_path / "train.jsonl").rename(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"train.csv has no column `label`"):
        tokenised(data, WORDPIECE, labels=True)


def test_the_separator_is_in_the_key(tmp_path: Path) -> None:
    """It is named beside the file of the tokenizer, not in it."""
    ends = []
    for token in ("[SEP]", "[CLS]"):
        tokenizer = embedded().info.tokenizer
        tokenizer.sep_token = token
        tokenizer.save_pretrained(tmp_path)
        options = PretrainedTokenizer(kind="pretrained", path=str(tmp_path))
        (tmp_path / "a.txt").write_text("The end.")
        text = Text(kind="text", path=str(tmp_path / "a.txt"))
        ends.append(int(tokenised(text, options).arrays["train.tokens"][-1]))
    assert ends == [SEP, CLS]


@pytest.mark.parametrize("text", ["", "\n \n" * 2000])
def test_no_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "empty.txt").write_text(text)
    for split, paths in {
        "train": {"path": str(tmp_path / "empty.txt")},
        "eval": {"path": str(tmp_path / "a.txt"), "eval_path": str(tmp_path / "empty.txt")},
    }.items():
        with pytest.raises(UserError, match=f"the split for {split} .* holds no text: .*empty.txt"):
            tokenised(Text.model_validate({"kind": "text", **paths}), WORDPIECE)
    (tmp_path / "bad.txt").write_bytes(b"\xff\n")
    bad = Text(kind="text", path=str(tmp_path / "bad.txt"), on_error="skip")
    with pytest.raises(UserError, match="holds no text") as caught:
        tokenised(bad, WORDPIECE)
    assert "bad.txt: line 1: is not UTF-8" in str(caught.value.problems[0].hint)
    with pytest.raises(UserError, match="the split for train of the data holds no text") as caught:
        labelled(tmp_path, [])
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_skipped_records_are_counted_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one two\nthr\xe9e\nfour\n")
    data = Text(kind="text", path=str(path), eval_path=str(path), on_error="skip")
    for _ in range(2):
        source = tokenised(data, WORDPIECE).source
        assert source.endswith("without 2 records that cannot be decoded")  # of both splits
    assert caplog.text.count("text.txt: line 2: is not UTF-8") == 2


def test_packed_sequences_hold_the_text_in_its_order() -> None:
    data = packed()
    stream = data._train
    sequences = data._sequences(stream, torch.tensor([0, 3]))
    assert sequences.shape == (2, 32)
    assert sequences[:, 0].eq(CLS).all() and sequences[:, -1].eq(SEP).all()
    assert sequences[1, 1:-1].tolist() == stream[90:120].tolist()
    assert data.num_train == len(stream) // 30


def test_documents_are_separated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    data = Text(kind="text", path=str(tmp_path), eval_path=str(tmp_path))
    tokens = tokenised(data, WORDPIECE)
    text = tokens.info.tokenizer.decode(tokens.arrays["train.tokens"].tolist())
    assert text.replace(" ", "") == "one[SEP]two[SEP]"


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    one, other = packed(), packed()
    other.train_batch(1, 7, 16)
    for step in (0, 5, 200):
        assert same(one.train_batch(3, step, 16), other.train_batch(3, step, 16))
    assert not same(one.train_batch(3, 0, 16), one.train_batch(4, 0, 16))
    epoch = one.num_train // 16
    first, again = one.train_batch(3, 0, 16), one.train_batch(3, epoch, 16)
    assert not same(first, again)  # another order, other masks


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    data = packed()
    whole = [
        list(zip(*map(list, b.tensors.values()), strict=True)) for b in data.eval_batches(10**6)
    ]
    parts = [list(zip(*map(list, b.tensors.values()), strict=True)) for b in data.eval_batches(7)]
    flat = [[row for batch in batches for row in batch] for batches in (whole, parts)]
    assert len(flat[0]) == len(flat[1]) == data.num_eval
    assert all(
        torch.equal(a, b)
        for row, same_row in zip(*flat, strict=True)
        for a, b in zip(row, same_row, strict=True)
    )


def test_too_little_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three")
    tokens = tokenised(Text(kind="text", path=str(path)), WORDPIECE)
    with pytest.raises(UserError, match=r"the training text has [0-9]+ tokens, and a sequence 128"):
        PackedText(tokens, lambda sequences, generator: Batch({"input_ids": sequences}))


def test_masking_hides_replaces_and_keeps() -> None:
    data = packed()
    drawn: Counter[str] = Counter()
    tokens = special = 0
    for step in range(60):
        batch = data.train_batch(0, step, 32)
        original = data._sequences(data._train, data._order.chosen(0, step, 32))
        guess = batch["labels"] != IGNORED
        rows = torch.arange(32)[:, None].expand_as(batch["positions"])[guess]
        places = batch["positions"][guess]
        assert torch.equal(batch["labels"][guess], original[rows, places])
        assert batch.weights == tuple(guess.sum(1).tolist())
        assert min(batch.weights) >= 1
        seen = batch["input_ids"][rows, places]
        drawn["hidden"] += int((seen == MASK).sum())
        drawn["kept"] += int((seen == batch["labels"][guess]).sum())
        drawn["chosen"] += len(seen)
        special += int((batch["labels"][guess] < 5).sum())
        tokens += int((original >= 5).sum())
        untouched = torch.ones_like(original, dtype=torch.bool)
        untouched[rows, places] = False
        assert torch.equal(batch["input_ids"][untouched], original[untouched])
    assert special == 0
    assert abs(drawn["chosen"] / tokens - 0.15) < 0.01
    assert abs(drawn["hidden"] / drawn["chosen"] - 0.8) < 0.02
    assert abs(drawn["kept"] / drawn["chosen"] - 0.1) < 0.02


def test_whole_words_are_chosen_together() -> None:
    data = packed(whole_word=True)
    tokenizer = data.info.tokenizer
    continues = torch.tensor(
        [name.startswith("##") for name in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    )
    split_words = 0
    for step in range(20):
        batch = data.train_batch(0, step, 32)
        original = data._sequences(data._train, data._order.chosen(0, step, 32))
        chosen = torch.zeros_like(original, dtype=torch.bool)
        chosen.scatter_(1, batch["positions"], batch["labels"] != IGNORED)
        goes_on = continues[original]
        goes_on[:, 1] = False  # after [CLS] a word begins that the cut may have split
        assert torch.equal(chosen[:, 1:][goes_on[:, 1:]], chosen[:, :-1][goes_on[:, 1:]])
        split_words += int((chosen & goes_on).sum())
    assert split_words > 100


def test_tokens_of_a_word_share_its_draw(tmp_path: Path) -> None:
    """Also those of a word that was begun before the sequence."""
    tokenizer = learnt(WORDPIECE, lambda: iter(["ab ab abc abc"] * 3))
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "##b", "##c"])
    sequences = torch.tensor([[b, c, a, b, c, a, a, SEP, a, b]]).repeat(4000, 1)
    mask = Masking(tokenizer, 0.3, whole_word=True)
    batch = mask(sequences, torch.Generator().manual_seed(0))
    chosen = torch.zeros_like(sequences, dtype=torch.bool)
    chosen.scatter_(1, batch["positions"], batch["labels"] != IGNORED)
    words = [[0, 1], [2, 3, 4], [5], [6], [8, 9]]
    for word in words:
        assert chosen[:, word].eq(chosen[:, word[:1]]).all()
    firsts = chosen[:, [word[0] for word in words]].double()
    together = firsts.T @ firsts / len(firsts)
    # At least one word of each sequence is chosen: this adds 0.7 ** 5 / 5 to each share.
    assert (together.diagonal() - 0.3 - 0.7**5 / 5).abs().max() < 0.03
    pairs = together[~torch.eye(5, dtype=torch.bool)]
    assert (pairs - 0.3**2).abs().max() < 0.02  # words are drawn on their own
    assert not chosen[:, 7].any()


def test_words_of_a_vocabulary_that_has_none(tmp_path: Path) -> None:
    tokenizer = learnt(WORDPIECE, lambda: iter(["a b c"] * 3))
    with pytest.raises(UserError, match="words can be told only from a WordPiece vocabulary"):
        Masking(tokenizer, 0.15, whole_word=True)


def test_labelled_texts_are_padded_and_cut(tmp_path: Path) -> None:
    tokens = labelled(tmp_path, ["a b c,0", "a,2", f"{'b ' * 50},1"])
    data = LabelledText(tokens)
    assert (data.num_train, data.num_eval, data.info.num_labels) == (3, 3, 3)
    (batch,) = data.eval_batches(8)
    assert batch["labels"].tolist() == [0, 2, 1]
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 16]
    assert batch["input_ids"].shape == (3, 16)
    assert batch["input_ids"][1].tolist()[3:] == [PAD] * 13
    assert batch["input_ids"][2][-1] == SEP
    assert [b["input_ids"].shape for b in data.eval_batches(2)] == [(2, 8), (1, 16)]
    assert batch.weight == 3
    assert same(data.train_batch(0, 5, 2), LabelledText(tokens).train_batch(0, 5, 2))


@pytest.mark.parametrize("label", ["0", "1", "good"])
def test_one_label_is_nothing_to_learn(tmp_path: Path, label: str) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=f"all records for training have .* {label}") as caught:
            labelled(tmp_path, [f"a,{label}", f"b,{label}"])
        assert caught.value.exit_code == Exit.ENVIRONMENT
        assert caught.value.problems[0].path == "data.label_column"


def test_a_label_that_is_only_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "validation.csv").write_text("text,label\na,5\nb,1\n")
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    data = Datasets(kind="datasets", path=str(tmp_path))
    for _ in range(2):  # from the cache, too
        assert tokenised(data, WORDPIECE, labels=True).info.num_labels == 6
    assert caplog.text.count("labels that only the held-out split has: [5]") == 2


def test_labels_with_gaps(tmp_path: Path) -> None:
    assert labelled(tmp_path, ["a,0", "b,999"]).info.num_labels == 1000
    with pytest.raises(UserError, match="the largest label is 1,000, and there are 2 different"):
        labelled(tmp_path, ["a,0", "b,1000"])
    many = [f"a,{label}" for label in range(0, 2200, 2)]  # such as a part of a larger set
    assert labelled(tmp_path, many).info.num_labels == 2199


def test_names_of_classes_are_known_from_the_cache(tmp_path: Path) -> None:
    for _ in range(2):
        tokens = labelled(tmp_path, ["a,dog", "b,cat", "c,dog"])
        assert tokens.info.label_names == ("cat", "dog")
        assert tokens.info.num_labels == 2
        assert tokens.arrays["train.labels"].tolist() == [1, 0, 1]
    assert labelled(tmp_path, ["a,0", "b,1"]).info.label_names == ()


def test_a_text_without_any_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made: Any = PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    options = PretrainedTokenizer(kind="pretrained", path=str(tmp_path))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("text,label\n,1\na b a,0\n  ,1\n")
    data = Datasets(kind="datasets", path=str(tmp_path))

    made(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    tokens = LabelledText(tokenised(data, options, labels=True))
    first, second, third = tokens.eval_batches(1)
    assert first["input_ids"].tolist() == third["input_ids"].tolist() == [[2] * 8]
    assert first["attention_mask"].tolist() == third["attention_mask"].tolist() == [[1] + [0] * 7]
    assert second["input_ids"].tolist() == [[0, 1, 0] + [2] * 5]

    made(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has neither a padding token nor one for the end"):
        tokenised(data, options, labels=True)


def test_pairs_have_types(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        row = '{"a": "x x", "b": "y y y", "label": %d}\n'
        (tmp_path / f"{split}.jsonl").write_text(row % 0 + row % 1)
    data = Datasets(kind="datasets", path=str(tmp_path), text_columns=("a", "b"))
    tokens = tokenised(data, WordPiece(kind="wordpiece", vocab_size=20), labels=True)
    (batch,) = LabelledText(tokens).eval_batches(2)
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 32}')
    data = Text(kind="text")
    with pytest.raises(UserError) as caught:
        tokenised(data, PretrainedTokenizer(kind="pretrained", path=str(tmp_path)))
    assert caught.value.exit_code == Exit.ENVIRONMENT
    assert caught.value.problems[0].path == "data.tokenizer"
