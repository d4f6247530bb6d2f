"""The long proofs on text (`make verify`); their table is in docs/verification.md."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from mpcli.data.text import tokenised
from mpcli.recipe.load import load_recipe
from mpcli.tasks.transformers_models import tokenizer_options
from tests.verify.page import Rows, machine, run, write

pytestmark = pytest.mark.verify


@pytest.fixture(scope="module")
def table() -> Iterator[Rows]:
    rows: Rows = []
    yield rows
    write("text", rows, machine())


def unigram_loss(run_directory: Path) -> float:
    """Cross-entropy of the held-out tokens under their counts in training, one added to each."""
    recipe: Any = load_recipe(run_directory / "recipe.yaml").recipe
    tokens = tokenised(recipe.data, tokenizer_options(recipe.task, recipe.data))
    size = len(tokens.info.tokenizer)
    counts = np.bincount(tokens.arrays["train.tokens"], minlength=size) + 1
    chances = counts / counts.sum()
    return float(-np.log(chances[tokens.arrays["eval.tokens"]]).mean())


def test_bert_tiny_learns_the_embedded_text_in_five_minutes(tmp_path: Path, table: Rows) -> None:
    started = time.monotonic()
    result, _ = run(tmp_path / "run", "bert-tiny-mlm.yaml")
    minutes = (time.monotonic() - started) / 60
    metrics, unigram = result["metrics"]["eval"], unigram_loss(tmp_path / "run")
    table.append(
        (
            "`bert-tiny-mlm`, 500 steps on the embedded text: held-out loss",
            f"{metrics['loss']:.2f} nats against {unigram:.2f} of the unigram, masked accuracy "
            f"{metrics['masked_accuracy']:.1%}, in {minutes:.1f} minutes, start-up included",
        )
    )
    assert metrics["loss"] <= unigram - 0.5
    assert minutes <= 5


def test_bert_tiny_learns_wikitext(tmp_path: Path, shared_data: Path, table: Rows) -> None:
    """The train split is not here: it learns from `valid.txt` and is measured on `test.txt`.

    Its words are more varied than those of the embedded text: 500 steps end 0.45 below the unigram.
    """
    folder = shared_data / "wikitext2"
    paths = (f"data.path={folder / 'valid.txt'}", f"data.eval_path={folder / 'test.txt'}")
    result, _ = run(tmp_path / "run", "bert-tiny-mlm.yaml", *paths, "train.steps=1000")
    metrics, unigram = result["metrics"]["eval"], unigram_loss(tmp_path / "run")
    table.append(
        (
            "`bert-tiny-mlm`, 1000 steps on WikiText-2's valid.txt: loss on test.txt",
            f"{metrics['loss']:.2f} nats against {unigram:.2f} of the unigram",
        )
    )
    assert metrics["loss"] <= unigram - 0.5


def test_fp16_learns_as_fp32(tmp_path: Path, table: Rows) -> None:
    """The mean loss of the last 25 of 100 steps."""
    means = {}
    for mode in ("fp32", "fp16"):
        short = (f"precision.mode={mode}", "train.steps=100", "eval.every=null")
        _, losses = run(tmp_path / mode, "bert-tiny-mlm.yaml", *short)
        means[mode] = sum(losses[-25:]) / 25
    apart = means["fp16"] / means["fp32"] - 1
    table.append(
        (
            "`bert-tiny-mlm`, 100 steps: mean training loss of the last 25 in fp16",
            f"{means['fp16']:.4f}, {abs(apart):.2%} from fp32's {means['fp32']:.4f}",
        )
    )
    assert abs(apart) <= 0.05


def test_gpt_small_learns_the_embedded_text(tmp_path: Path, table: Rows) -> None:
    """In fp32: the recipe's fp16 is slow on CPUs."""
    short = (
        "precision={mode: fp32, loss_scale: {kind: none}}",
        "train={steps: 150, global_batch_size: 16}",
    )
    result, _ = run(tmp_path / "run", "gpt-small.yaml", *short)
    loss, unigram = result["metrics"]["eval"]["loss"], unigram_loss(tmp_path / "run")
    table.append(
        (
            "`gpt-small` in fp32, 150 steps of 16 on the embedded text: held-out loss",
            f"{loss:.2f} nats against {unigram:.2f} of the unigram",
        )
    )
    assert loss <= unigram - 0.5


def test_sst2_from_a_masked_language_model(tmp_path: Path, shared_data: Path, table: Rows) -> None:
    """A model that has seen SST-2's sentences, but no labels, against one with random weights.

    Its head start is worth some 50 steps, as minutes of pre-training on 800,000 tokens are little:
    it counts where labelled steps are few, and `sst2` at twice its rate or after an epoch has
    caught up.
    """
    sentences = (
        # Short sequences hold little more than one sentence: nothing else to attend to.
        "data={kind: datasets, hub: stanfordnlp/sst2, text_columns: [sentence], "
        "sequence_length: 16, tokenizer: {kind: wordpiece, vocab_size: 2048}}"
    )
    steps = ("train.steps=2000", "train.global_batch_size=64", "eval.every=null")
    before, _ = run(
        tmp_path / "mlm", "bert-tiny-mlm.yaml", sentences, *steps, "task.mask_probability=0.2"
    )
    table.append(
        (
            "`bert-tiny-mlm`, 2000 steps on the sentences of SST-2: masked accuracy",
            f"{before['metrics']['eval']['masked_accuracy']:.1%}",
        )
    )
    models = {
        "random weights": ("data.tokenizer={kind: wordpiece, vocab_size: 2048}",),
        "that model": (
            "task.model=null",
            f"task.init_from={tmp_path / 'mlm'}",
            "data.tokenizer=null",
        ),
    }
    accuracies: dict[tuple[str, str], float] = {}
    for rate in ("5e-4", "1e-3"):
        for name, overrides in models.items():
            found = []
            for seed in (0, 1, 2):
                short = (
                    f"optim.lr={rate}",
                    f"train={{steps: 100, global_batch_size: 64, seed: {seed}}}",
                    "eval.every=null",
                )
                folder = tmp_path / f"{rate} {name} {seed}"
                result, _ = run(folder, "sst2.yaml", *short, *overrides)
                found.append(result["metrics"]["eval"]["accuracy"])
            accuracies[rate, name] = mean(found)
            table.append(
                (
                    f"`sst2`, 100 steps at lr {rate} from {name}: accuracy, three seeds",
                    ", ".join(f"{accuracy:.1%}" for accuracy in found),
                )
            )
    assert accuracies["5e-4", "that model"] >= accuracies["5e-4", "random weights"] + 0.05


def test_sst2_reaches_78_percent(tmp_path: Path, shared_data: Path, table: Rows) -> None:
    started = time.monotonic()
    result, _ = run(tmp_path / "run", "sst2.yaml")
    minutes = (time.monotonic() - started) / 60
    metrics = result["metrics"]["eval"]
    table.append(
        (
            "`sst2`, 3 epochs from random weights: accuracy on the 872 validation sentences",
            f"{metrics['accuracy']:.1%}, F1 {metrics['f1']:.1%}, in {minutes:.1f} minutes",
        )
    )
    assert metrics["accuracy"] > 0.78
    assert minutes <= 15
