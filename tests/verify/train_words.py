"""A neural language model on WikiText-2 in one precision: a process of its own.

Bengio et al., A Neural Probabilistic Language Model, 2003: embeddings of the two words before, a
hidden layer, logits over the vocabulary. Nothing in it is made for failure. The gradient of a logit
that is not the target is p / N: with a vocabulary of 8,192 and a batch of 8,192 words that is
about 2^-26 at first, below half of fp16's smallest number, and language models are trained with
larger vocabularies and batches than these.

Prints one JSON object: perplexity on the test text, skipped steps, and the share of the output
layer's weight gradients that are zero, over the steps.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.engines.local import LocalEngine
from mpcli.precision.numerics import numeric_settings
from mpcli.recipe.load import load_recipe

VOCABULARY, BATCH, CONTEXT, WIDTH, STEPS = 8192, 8192, 2, 16, 40
CPU = torch.device("cpu")
RECIPE = f"""\
name: words
task: {{kind: image-classification, model: {{kind: smallnet}}}}  # replaced below
data: {{kind: digits}}
optim: {{kind: adamw, lr: 0.01, weight_decay: 0, schedule: {{kind: cosine}}}}
train: {{steps: {STEPS}, global_batch_size: {BATCH}}}
engine: {{kind: local, device: cpu}}
"""


class LanguageModel(nn.Module):
    """Logits of the next word from the words before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(CONTEXT * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, words: Tensor) -> Tensor:
        """int64 [N, CONTEXT] -> [N, VOCABULARY]."""
        logits: Tensor = self.head(torch.relu(self.hidden(self.embedding(words).flatten(1))))
        return logits


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy, summed in fp32."""
    losses = F.cross_entropy(model(batch["inputs"]).float(), batch["targets"], reduction="sum")
    return losses, batch.weight


def to_batch(examples: Tensor) -> Batch:
    """The last word of each example is its target."""
    return Batch({"inputs": examples[:, :-1], "targets": examples[:, -1]})


def windows(folder: Path) -> tuple[Tensor, Tensor]:
    """Training and test examples, int64 [N, CONTEXT + 1]; rare words are word 0."""
    train, test = ((folder / name).read_text("utf-8").split() for name in ("valid.txt", "test.txt"))
    known = Counter(train).most_common(VOCABULARY - 1)
    number = {word: index for index, (word, _) in enumerate(known, 1)}
    ids = (torch.tensor([number.get(word, 0) for word in words]) for words in (train, test))
    train_windows, test_windows = (words.unfold(0, CONTEXT + 1, 1) for words in ids)
    return train_windows, test_windows[:40_000]


def main(folder: str, seed: str, *overrides: str) -> dict[str, Any]:
    """Train with `--set` values of the precision."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "words.yaml")
        path.write_text(RECIPE)
        recipe = load_recipe(path, overrides).recipe
    train, test = windows(Path(folder))
    torch.manual_seed(int(seed))
    model = LanguageModel()
    engine = LocalEngine(recipe, model, CPU, STEPS)
    order = torch.Generator().manual_seed(int(seed))
    skipped, zeros = 0, 0.0
    with numeric_settings(recipe.precision, CPU):
        for _ in range(STEPS):
            examples = train[torch.randint(len(train), (BATCH,), generator=order)]
            batch = to_batch(examples)
            engine.accumulate(loss, batch, BATCH, last=True)
            assert model.head.weight.grad is not None
            zeros += (model.head.weight.grad == 0).double().mean().item() / STEPS
            skipped += int(engine.step().found_inf)
        with engine.evaluating() as evaluated:
            parts = map(to_batch, test.split(4000))
            total = sum(loss(evaluated, part)[0].item() for part in parts)
    return {"perplexity": math.exp(total / len(test)), "skipped": skipped, "zeros": zeros}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
