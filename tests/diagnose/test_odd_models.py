"""Models that are sound, and hold more than parameters: replay runs them as the run did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcli.diagnose.places import gather
from mpcli.diagnose.replay import replay
from mpcli.diagnose.summary import verdict
from mpcli.rundir import RunDirectory
from mpcli.tasks import image_classification
from tests.small import run_small


class WeightNorm(nn.Module):
    """Its `weight` is no leaf, which no deep copy takes."""

    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(FutureWarning):
            self.layer = nn.utils.weight_norm(nn.Linear(64, 16))

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values)


class Closure(nn.Module):
    """A copy of its function would still call the first model's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 16)
        self.act = lambda values: self.inner(values)

    def forward(self, values: Tensor) -> Tensor:
        return self.act(values)


class Grows(nn.Module):
    """A cache that is made on first use and grows with the step, as its size says elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.size, self.made = nn.Linear(64, 16), 1, False
        self.register_buffer("table", torch.ones(1), persistent=False)
        self.register_buffer("mask", None)

    def forward(self, values: Tensor) -> Tensor:
        if self.size < 64:
            self.size, self.table = self.size + 63, torch.linspace(1, 2, 64, dtype=values.dtype)
        if not self.made:
            self.made, self.mask = True, torch.ones(64, dtype=values.dtype)
            self.register_buffer("late", torch.ones(64, dtype=values.dtype))
        return self.inner(values * self.table[: values.shape[1]] * self.mask * self.late)


class Counts(nn.Module):
    """What it returns depends on how often it was called: a buffer says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 16)
        self.register_buffer("calls", torch.ones(1))

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(values) * self.calls.clone()


class Noisy(nn.Module):
    """From one seed `rand` gives other numbers in half precision than in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 16)

    def forward(self, values: Tensor) -> Tensor:
        return self.inner(values + 9.0 * torch.rand_like(values) - 4.5)


@pytest.mark.parametrize("mode", ["bf16", "bf16-pure"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [WeightNorm, Closure, Grows, Counts, Noisy])
def test_replay_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], mode: str, steps: int
) -> None:
    def build_model(options: Any, info: Any) -> nn.Module:
        sizes = math.prod(info.input_shape), info.num_classes
        return nn.Sequential(
            nn.Flatten(), nn.Linear(sizes[0], 64), nn.Dropout(0.1), kind(), nn.Linear(16, sizes[1])
        )

    monkeypatch.setattr(image_classification, "build_model", build_model)
    overrides = (f"precision.mode={mode}", f"train.steps={steps}", "output.checkpoint_every=null")
    run, _ = run_small(tmp_path, *overrides)
    found = replay(RunDirectory.read(run.path), tell=lambda text: None)
    assert found.reproduced and found.same_random_numbers
    assert (found.origin, found.parting, found.nondeterministic) == (None, None, ())
    outputs = {row.module: row.output for row in found.modules}
    whole = outputs[""]
    assert whole and 0 < whole.error < 0.1  # a shadow of its own, with the same weights


class NearlyEqual(nn.Module):
    """Nothing but the rounding of two layers, added to what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.diff = nn.Linear(64, 16), nn.Linear(64, 16), Difference()
        self.two.load_state_dict(self.one.state_dict())
        with torch.no_grad():
            self.two.weight *= 1 + 1e-5

    def forward(self, values: Tensor) -> Tensor:
        one, two = self.one(values), self.two(values)
        return one + self.diff(one, two)


class Difference(nn.Module):
    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return one - two


class LastDifference(nn.Module):
    """The model's own result is one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor) -> Tensor:
        results = self.inner(values)
        return results - results.detach() * (1 - 1e-5)


@pytest.mark.parametrize("mode", ["fp16", "bf16", "bf16-pure"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_difference_of_nearly_equal_tensors_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, whole: bool
) -> None:
    def build_model(options: Any, info: Any) -> nn.Module:
        size = math.prod(info.input_shape)
        layers = [nn.Flatten(), nn.Linear(size, 64), NearlyEqual(), nn.Linear(16, info.num_classes)]
        model = nn.Sequential(*layers)
        return LastDifference(model) if whole else model

    monkeypatch.setattr(image_classification, "build_model", build_model)
    run, _ = run_small(tmp_path, f"precision.mode={mode}", "train.steps=1")
    found = replay(RunDirectory.read(run.path), tell=lambda text: None)
    errors = [row.output.error for row in found.modules if row.type == "Difference" and row.output]
    assert errors and errors[0] > 1
    assert found.parting is None
    assert "no module parts from fp32 (at most " in verdict(gather(run.path).facts, found)
