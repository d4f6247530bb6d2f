"""The long proofs on text (`make verify`); their table is docs/verification-text.md."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mpcli.data.text import tokenised
from mpcli.recipe.load import load_recipe
from mpcli.tasks.transformers_models import tokenizer_options

pytestmark = pytest.mark.verify
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "verification-text.md"
MPTRAIN = Path(sys.executable).with_name("mptrain")

Table = list[tuple[str, str]]


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Rows (what, measured), written to the committed table at the end."""
    rows: Table = []
    yield rows
    lines = [
        "# What `make verify` measured on text",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Written by `make verify`.",
        "",
        "| what | measured |",
        "| --- | --- |",
        *(f"| {what} | {measured} |" for what, measured in rows),
    ]
    TABLE.write_text("\n".join(lines) + "\n", "utf-8")


def run(folder: Path, recipe: str, *overrides: str) -> tuple[dict[str, Any], list[float]]:
    """`mptrain run` in a process of its own: its metrics on held-out text, and its losses."""
    arguments = [argument for override in overrides for argument in ("--set", override)]
    process = subprocess.run(
        [MPTRAIN, "run", ROOT / "recipes" / recipe, "--json", "--output", folder, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
        stdout=subprocess.PIPE,
        check=True,
    )
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return json.loads(process.stdout)["metrics"]["eval"], [float(row["loss"]) for row in rows]


def unigram_loss(run_directory: Path) -> float:
    """Cross-entropy of the held-out tokens under their counts in training, one added to each."""
    recipe: Any = load_recipe(run_directory / "recipe.yaml").recipe
    tokens = tokenised(recipe.data, tokenizer_options(recipe.task, recipe.data))
    size = len(tokens.info.tokenizer)
    counts = np.bincount(tokens.arrays["train.tokens"], minlength=size) + 1
    chances = counts / counts.sum()
    return float(-np.log(chances[tokens.arrays["eval.tokens"]]).mean())


def test_bert_tiny_learns_the_embedded_text_in_five_minutes(tmp_path: Path, table: Table) -> None:
    started = time.monotonic()
    metrics, _ = run(tmp_path / "run", "bert-tiny-mlm.yaml")
    minutes = (time.monotonic() - started) / 60
    unigram = unigram_loss(tmp_path / "run")
    table.append(
        (
            "`bert-tiny-mlm`, 500 steps on the embedded text: held-out loss",
            f"{metrics['loss']:.2f} nats against {unigram:.2f} of the unigram, masked accuracy "
            f"{metrics['masked_accuracy']:.1%}, in {minutes:.1f} minutes, start-up included",
        )
    )
    assert metrics["loss"] <= unigram - 0.5
    assert minutes <= 5


def test_bert_tiny_learns_wikitext(tmp_path: Path, shared_data: Path, table: Table) -> None:
    """The train split is not here: it learns from `valid.txt` and is measured on `test.txt`.

    Its words are more varied than those of the embedded text: 500 steps end 0.45 below the unigram.
    """
    folder = shared_data / "wikitext2"
    paths = (f"data.path={folder / 'valid.txt'}", f"data.eval_path={folder / 'test.txt'}")
    metrics, _ = run(tmp_path / "run", "bert-tiny-mlm.yaml", *paths, "train.steps=1000")
    unigram = unigram_loss(tmp_path / "run")
    table.append(
        (
            "`bert-tiny-mlm`, 1000 steps on WikiText-2's valid.txt: loss on test.txt",
            f"{metrics['loss']:.2f} nats against {unigram:.2f} of the unigram",
        )
    )
    assert metrics["loss"] <= unigram - 0.5


def test_fp16_learns_as_fp32(tmp_path: Path, table: Table) -> None:
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


def test_sst2_from_a_masked_language_model(tmp_path: Path, shared_data: Path, table: Table) -> None:
    """Pre-trained on SST-2's own sentences, then fine-tuned, against as many steps from random."""
    sentences = (
        "data={kind: datasets, hub: stanfordnlp/sst2, text_columns: [sentence], "
        "sequence_length: 64, tokenizer: {kind: wordpiece, vocab_size: 8192}}"
    )
    steps = ("train.steps=2000", "train.global_batch_size=64", "eval.every=null")
    pretrained, _ = run(tmp_path / "mlm", "bert-tiny-mlm.yaml", sentences, *steps)
    models = {
        "random weights": (),
        "the masked language model": (
            "task.model=null",
            f"task.init_from={tmp_path / 'mlm'}",
            "data.tokenizer=null",
        ),
    }
    accuracy = {}
    for number, (name, overrides) in enumerate(models.items()):
        found, _ = run(tmp_path / str(number), "sst2.yaml", "train.epochs=1", *overrides)
        accuracy[name] = found["accuracy"]
        table.append(
            (
                f"`sst2`, one epoch from {name}: accuracy on the 872 validation sentences",
                f"{found['accuracy']:.1%}, F1 {found['f1']:.1%}",
            )
        )
    table.append(("its pre-training: perplexity", f"{math.exp(pretrained['loss']):.0f}"))
    assert accuracy["the masked language model"] >= 0.78
