"""A Hugging Face Trainer that goes wrong is diagnosed from its recording, and the fix mends it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcli.recorder import HFRecorder
from mpcli.rundir import RunDirectory
from tests.recorder.conftest import _quick_environment  # noqa: F401
from tests.recorder.test_huggingface import _fresh_accelerate, bert, trainer  # noqa: F401

pytest.importorskip("accelerate")
STEPS = 30


class LogOdds(nn.Module):
    """log(1 - p) and log(p) as people write them: bf16 has no number between 1 - 2^-8 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(x * 8)
        return torch.stack([(1 - p).log(), p.log()], dim=-1)


class WideDense(nn.Module):
    """A dense layer whose weights somebody stores in fp16, as T5's `wo` was: it casts its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 64)
        self.wo = nn.Linear(64, 16).half()

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x).square() * 1e5
        return self.wo(wide.to(self.wo.weight.dtype)).to(x.dtype) * 1e-5


class Reader(nn.Module):
    """A BERT of transformers, with another head on its first token."""

    def __init__(self, head: nn.Module, logits: nn.Module) -> None:
        super().__init__()
        self.bert = bert().bert
        self.head, self.logits = head, logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        x = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        logits = self.logits(self.head(x))
        return {"loss": nn.functional.nll_loss(logits.float(), labels), "logits": logits}


def odds_of_bert() -> nn.Module:
    return Reader(nn.Sequential(nn.Linear(16, 1), nn.Flatten(0)), LogOdds())


def wide_bert() -> nn.Module:
    return Reader(WideDense(), nn.Sequential(nn.Linear(16, 2), nn.LogSoftmax(-1)))


def train(folder: Path, model: nn.Module, **arguments: Any) -> list[float]:
    """Losses of a training that is recorded in `folder / "run"`."""
    training = trainer(folder, model, max_steps=STEPS, **arguments)
    recorder = HFRecorder(training, out=folder / "run", every=10)
    with contextlib.redirect_stdout(sys.stderr):
        training.train()
    recorder.close()
    return [row.loss for row in RunDirectory.read(folder / "run").steps()]


def is_well(losses: list[float]) -> bool:
    """Finite, and falling: the last third below the first."""
    third = len(losses) // 3
    return all(map(math.isfinite, losses)) and sum(losses[-third:]) < sum(losses[:third])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "arguments", "kind", "layer"),
    [
        (odds_of_bert, {"bf16": True, "learning_rate": 5e-3}, "backward-nonfinite", "logits"),
        (wide_bert, {"learning_rate": 1e-3}, "forward-overflow", "head"),
    ],
)
def test_every_suggestion_for_a_trainer_gone_nan_mends_it(
    make: Callable[[], nn.Module],
    arguments: dict[str, Any],
    kind: str,
    layer: str,
    tmp_path: Path,
    mptrain: Callable[..., Any],
) -> None:
    assert not is_well(train(tmp_path / "broken", make(), **arguments))
    said = mptrain("diagnose", tmp_path / "broken" / "run", "--json").json
    (found,) = [cause for cause in said["findings"] if cause["severity"] == "error"]
    assert (found["id"], found["layers"]) == (kind, [layer])

    model = make()
    exec(found["suggestion"]["code"], {"torch": torch, "model": model})
    assert is_well(train(tmp_path / "code", model, **arguments))

    for number, other in enumerate(found["alternatives"]):
        if other["arguments"]:
            changed = arguments | other["arguments"]
            assert is_well(train(tmp_path / f"arguments-{number}", make(), **changed))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_trainer_gets_no_finding(
    arguments: dict[str, Any], seed: int, tmp_path: Path, mptrain: Callable[..., Any]
) -> None:
    train(tmp_path, bert(), learning_rate=1e-3, seed=seed, **arguments)
    said = mptrain("diagnose", tmp_path / "run", "--json").json
    assert [cause for cause in said["findings"] if cause["severity"] != "info"] == []


def test_fp16_of_a_trainer_that_a_cpu_leaves_out_is_told(
    tmp_path: Path, mptrain: Callable[..., Any]
) -> None:
    try:
        losses = train(tmp_path, bert(), fp16=True, learning_rate=1e-3)
    except ValueError as error:  # a version that refuses
        pytest.skip(str(error))
    assert is_well(losses)
    said = mptrain("diagnose", tmp_path / "run", "--json").json
    if "autocast-inactive" in said["verdict"]:
        (found,) = said["findings"]
        assert found["suggestion"]["arguments"] == {"fp16": False, "bf16": True}
