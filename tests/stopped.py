"""Ways to stop a run, and what the same run without that must have in common with it."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpcli import checkpoint
from mpcli.engines.local import LocalEngine
from mpcli.rundir import RunDirectory
from tests.small import run_small

EVERY_OTHER = "output.checkpoint_every=2 steps"
MEASURED = {  # what no two runs have in common
    *("attempt", "samples_per_second", "seconds"),
    *("memory_allocated_bytes", "memory_peak_bytes", "peak_memory_bytes"),
}
MODES = {
    "fp32": [],
    "adamw": ["optim={kind: adamw, lr: 0.01, schedule: {kind: cosine, warmup: 0.2}}"],
    "ema": ["train.ema=0.9", "optim.momentum=0"],
    "fp16": ["precision.mode=fp16"],
    "fp16-hysteresis": [
        "precision={mode: fp16, loss_scale: "
        "{kind: dynamic, init_scale: 262144, hysteresis: 2, growth_interval: 3}}"
    ],
    "scheduled": [
        "precision={mode: fp16, loss_scale: "
        "{kind: scheduled, points: [[0, 1024], [3, 256], [5, 512]]}}"
    ],
    "fp16-master": ["precision.mode=fp16-master", "optim={kind: adam, lr: 0.01}"],
    "bf16-pure": [
        "precision={mode: bf16-pure, stochastic_rounding: true, sensitive_layers: [norm]}",
        "optim={kind: adamw, lr: 0.01}",
    ],
    "accumulation": ["precision.mode=fp16", "train.micro_batch_size=7"],
    "async": ["precision.mode=fp16", "output.async_checkpoint=true"],
    "workers": ["engine.data_workers=2", "data.augment=[flip, crop, cutout]"],
    "rollback": [
        "precision={mode: fp16, loss_scale: {kind: static, scale: 1024}}",
        "train.on_nonfinite=rollback",
    ],
}
LENGTH = ["train.steps=7", "eval.every=3 steps"]


class Killed(BaseException):
    """Nothing of the program sees this coming, as with SIGKILL."""


def kill_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The process dies in the middle of these steps (by number of calls, over all attempts)."""
    at_calls(monkeypatch, steps, die)


def signal_at(monkeypatch: pytest.MonkeyPatch, number: int, *steps: int) -> None:
    """A signal arrives in the middle of these steps."""
    at_calls(monkeypatch, steps, lambda: signal.raise_signal(number))


def at_calls(
    monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], act: Callable[[], None]
) -> None:
    step, calls = LocalEngine.step, itertools.count(1)

    def watched(self: LocalEngine) -> Any:
        if next(calls) in steps:
            act()
        return step(self)

    monkeypatch.setattr(LocalEngine, "step", watched)


def die() -> None:
    """The end, in the middle of anything."""
    raise Killed


def rows(run: RunDirectory, name: str = "steps.jsonl") -> list[dict[str, Any]]:
    """Rows without what differs between any two runs."""
    lines = (run.path / name).read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in MEASURED}
        for line in lines
    ]


def last_state(run: RunDirectory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything in the newest checkpoint."""
    newest, problems = checkpoint.newest_valid(run.checkpoints_path)
    assert newest is not None
    assert not problems
    tensors, state = checkpoint.load(newest)
    return tensors, {key: value for key, value in state.items() if key not in MEASURED}


def assert_same_run(run: RunDirectory, other: RunDirectory) -> None:
    """Records, weights, optimizer, scaler, random states: equal to the last bit."""
    for name in ("steps.jsonl", "evals.jsonl"):
        assert rows(run, name) == rows(other, name)
    (tensors, state), (expected, expected_state) = last_state(run), last_state(other)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8)
        ), name
    final, expected_final = (
        (r.final_path / "model.safetensors").read_bytes() for r in (run, other)
    )
    assert final == expected_final


def killed_run(folder: Path, *overrides: str, name: str = "run") -> RunDirectory:
    """A run whose process dies; its lock dies with it."""
    with pytest.raises(Killed):
        run_small(folder, *overrides, name=name)
    return RunDirectory(folder / name)
