"""Every mode on real digits over three seeds (`make verify`); tables go to docs/precision.md."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.verify
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "precision.md"
SEEDS = (0, 1, 2)
# The logits of a step take 256 MB: glibc would return them to the system after every operation.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
PRECISIONS = {
    "`fp32`": "{mode: fp32}",
    "`fp16`": "{mode: fp16}",
    "`bf16`": "{mode: bf16}",
    "`fp16-master`": "{mode: fp16-master}",
    "`bf16-master`": "{mode: bf16-master}",
    "`fp16-pure`": "{mode: fp16-pure}",
    "`bf16-pure`": "{mode: bf16-pure}",
    "`bf16-pure`, stochastic rounding": "{mode: bf16-pure, stochastic_rounding: true}",
}
RATES = {
    "lr 5e-3 falling to 0, 220 steps": (
        "optim={kind: adamw, lr: 5e-3, schedule: {kind: linear}}",
        "train.steps=220",
    ),
    "lr 1e-4, 880 steps": ("optim={kind: adamw, lr: 1e-4}", "train.steps=880"),
}
HIGH, LOW = RATES
Runs = dict[tuple[str, str], list[dict[str, Any]]]


def train(precision: str, rate: str, seed: int) -> dict[str, Any]:
    """One run of digits."""
    settings = (f"precision={precision}", *RATES[rate], f"train.seed={seed}")
    return run_module("train_digits", *settings)


def run_module(name: str, *arguments: str) -> dict[str, Any]:
    """What a script beside this file prints, on one thread."""
    process = subprocess.run(
        [sys.executable, "-m", f"tests.verify.{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **KEEP_MEMORY},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def in_parallel(run: Callable[[Any], dict[str, Any]], cases: list[Any]) -> list[dict[str, Any]]:
    """A process per CPU at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, cases))


@pytest.fixture(scope="module")
def runs() -> Runs:
    """(precision, rate) -> a result per seed."""
    cases = list(product(PRECISIONS, RATES, SEEDS))
    results = in_parallel(lambda case: train(PRECISIONS[case[0]], *case[1:]), cases)
    found: Runs = {}
    for (precision, rate, _), result in zip(cases, results, strict=True):
        found.setdefault((precision, rate), []).append(result)
    return found


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, str]]:
    """Title -> table, written between the page's markers at the end."""
    sections: dict[str, str] = {}
    yield sections
    measured = (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}. Written by `make verify`."
    )
    text = "\n\n".join((measured, *(f"### {title}\n\n{body}" for title, body in sections.items())))
    before = PAGE.read_text("utf-8")
    PAGE.write_text(docs().between(before, "measured", text + "\n", "make verify"), "utf-8")


def docs() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracy(results: list[dict[str, Any]]) -> float:
    """Mean over seeds; a run that diverged has learnt nothing."""
    return mean(result["accuracy"] or 0.0 for result in results)


def cell(results: list[dict[str, Any]]) -> str:
    accuracies = [f"{r['accuracy']:.1%}" if r["accuracy"] else r["status"] for r in results]
    return f"{accuracy(results):.1%} ({', '.join(accuracies)})"


def test_digits_in_every_mode(runs: Runs, page: dict[str, str]) -> None:
    head = ("precision", *RATES, "updates lost", "second moments that are 0")
    rows = [
        (
            name,
            *(cell(runs[name, rate]) for rate in RATES),
            *(
                ", ".join(f"{mean(r[what] for r in runs[name, rate]):.1%}" for rate in RATES)
                for what in ("unchanged", "without_moment")
            ),
        )
        for name in PRECISIONS
    ]
    page["Digits in every mode"] = (
        "AdamW, batch 64, `smallnet` of width 8; accuracy on the 360 test images, mean and each of "
        "three seeds. The last two columns, for the two rates: share of elements with a non-zero "
        "gradient whose stored weight did not change in a step, or whose second moment is zero, "
        "over all steps. (Stochastic rounding leaves many weights unchanged in a step too; its "
        "mean is right.)\n\n" + docs().table(head, rows)
    )

    for rate in RATES:
        exact = accuracy(runs["`fp32`", rate])
        for name in ("`fp16`", "`bf16`", "`fp16-master`", "`bf16-master`"):
            assert abs(accuracy(runs[name, rate]) - exact) <= 0.01, (name, rate)

    # A small rate: bf16 loses most updates, masters and stochastic rounding none that matter.
    exact = accuracy(runs["`fp32`", LOW])
    assert accuracy(runs["`bf16-pure`", LOW]) < exact - 0.05
    assert mean(r["unchanged"] for r in runs["`bf16-pure`", LOW]) > 0.5
    assert abs(accuracy(runs["`bf16-pure`, stochastic rounding", LOW]) - exact) <= 0.01

    # A large rate: where a second moment is zero in fp16, the update is divided by eps.
    exact = accuracy(runs["`fp32`", HIGH])
    assert accuracy(runs["`fp16-pure`", HIGH]) < exact - 0.01
    assert mean(r["without_moment"] for r in runs["`fp16-pure`", HIGH]) > 0.1
    assert all(r["without_moment"] == 0 for r in runs["`fp16-master`", HIGH])


def test_a_task_that_needs_the_loss_scale(page: dict[str, str], shared_data: Path) -> None:
    """Perplexity of a language model: without a scale, fp16 loses the small gradients."""
    precisions = {
        "`fp32`": "{mode: fp32}",
        "`fp16`, scale 1": "{mode: fp16, loss_scale: {kind: none}}",
        "`fp16`, dynamic scale": "{mode: fp16}",
    }
    text = str(shared_data / "wikitext2")
    cases = [(name, str(seed)) for name in precisions for seed in SEEDS]
    results = in_parallel(
        lambda case: run_module("train_words", text, case[1], f"precision={precisions[case[0]]}"),
        cases,
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for (name, _), result in zip(cases, results, strict=True):
        found.setdefault(name, []).append(result)
    perplexity = {name: mean(r["perplexity"] for r in results) for name, results in found.items()}

    def each(results: list[dict[str, Any]]) -> str:
        return ", ".join(f"{result['perplexity']:.0f}" for result in results)

    rows = [
        (
            name,
            f"{perplexity[name]:.0f} ({each(results)})",
            f"{mean(r['zeros'] for r in results):.1%}",
            sum(r["skipped"] for r in results),
        )
        for name, results in found.items()
    ]
    head = ("precision", "perplexity", "gradients of the output weights that are 0", "skipped")
    page["A task that needs the loss scale"] = (
        "Words of WikiText-2, the neural language model of Bengio et al. (2003), vocabulary and "
        "batch of 8,192 words, AdamW, 40 steps. The gradient of a logit that is not the target is "
        "p / N, at first 2^-26: fp16 without a scale makes it zero, so that logits are pushed up "
        "and hardly ever down. Language models are trained with larger vocabularies and batches. "
        "Perplexity on the test text, mean and each of three seeds.\n\n" + docs().table(head, rows)
    )
    exact = perplexity["`fp32`"]
    noise = max(abs(r["perplexity"] - exact) for r in found["`fp32`"])
    assert abs(perplexity["`fp16`, dynamic scale"] - exact) <= max(noise, 0.01 * exact)
    assert min(r["perplexity"] for r in found["`fp16`, scale 1"]) > 1.15 * exact
