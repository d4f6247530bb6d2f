"""What a loop that is not ours is told to change is code that can be written so."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import nn

from mpcli.diagnose import remedies
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.facts import Facts, RunFacts
from mpcli.records import ForeignRun


def foreign(loop: str = "pytorch", device: str = "cpu") -> Evidence:
    about = ForeignRun(
        loop=loop, model="M", parameters=1, optimizer="SGD", scaler="GradScaler", every=1,
        device=device,
    )  # fmt: skip
    run = RunFacts(
        foreign=about, result=None, steps=0, skipped=0, nonfinite_losses=0, first_nonfinite=None,
        last=(), sampled=(), flights=(), events=(), types={}, unread={},
    )  # fmt: skip
    return Evidence(Facts(path="x", kind="run", run=run))


REMEDIES = {
    "bf16": remedies.bf16,
    "fp32": remedies.fp32,
    "fp32_layers": lambda e: remedies.fp32_layers(e, ("a.b", "LayerNorm")),
    "dynamic_scale": remedies.dynamic_scale,
    "static_scale": lambda e: remedies.static_scale(e, 0.3),
    "clip_norm": lambda e: remedies.clip_norm(e, 1.25),
    "masters": remedies.masters,
    "autocast": remedies.autocast,
    "half_layers": lambda e: remedies.half_layers(e, ("a",)),
    "clip_unscaled": lambda e: remedies.clip_unscaled(e, 1.0, is_norm=False),
    "scaler_step": remedies.scaler_step,
    "window, zero": lambda e: remedies.window(e, zero=True, scale=False),
    "window, scale": lambda e: remedies.window(e, zero=False, scale=True),
    "window": lambda e: remedies.window(e, zero=False, scale=False),
    "unfused": remedies.unfused,
    "lower_first_scale": remedies.lower_first_scale,
}


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("name", REMEDIES)
def test_code_is_python_for_the_loop_s_device(name: str, device: str) -> None:
    said = REMEDIES[name](foreign(device=device))
    assert said.set == () and said.arguments == {}
    ast.parse(said.code)
    assert {"cpu": "'cuda'", "cuda:1": "'cpu'"}[device] not in said.code


def test_a_trainer_is_told_its_arguments() -> None:
    from transformers import TrainingArguments

    trainer = foreign("transformers")
    for remedy in (
        remedies.bf16(trainer),
        remedies.fp32(trainer),
        remedies.dynamic_scale(trainer),
        remedies.clip_norm(trainer, 1.0),
        remedies.adam_eps(trainer, 1e-4),
        remedies.autocast(trainer),
    ):
        assert remedy.arguments
        assert set(remedy.arguments) <= set(TrainingArguments.__dataclass_fields__)


def test_layers_are_computed_in_fp32_by_name_and_by_class_however_they_are_called() -> None:
    class Given(nn.Module):
        """Is given None and an integer, too."""

        def forward(self, x, *, scale=None, times=1):
            return x * times, x.dtype

    model = nn.ModuleDict({"line": nn.Linear(4, 4).half(), "norm": nn.LayerNorm(4), "own": Given()})
    code = remedies.fp32_layers(foreign(), ("line", "LayerNorm", "own")).code
    exec(code, {"torch": torch, "model": model})
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model["line"](x).dtype == model["norm"](x).dtype == torch.float32
        assert model["own"](x=x, scale=None, times=2)[1] == torch.float32
        assert nn.Linear(4, 4)(x).dtype == torch.bfloat16
