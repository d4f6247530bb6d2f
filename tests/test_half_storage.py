"""Steps of weights and state that are stored in half precision: fp32 arithmetic, one rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mpcli.optim import build_optimizer, half_storage
from mpcli.optim.half_storage import HalfStorageStep
from mpcli.recipe.optim import AdamW, Optim, Sgd

SHAPES = [(3, 5), (7,), (4, 4), (2,), (6, 3)]
OPTIMS: list[Optim] = [
    Sgd(kind="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    AdamW(kind="adamw", lr=0.01, eps=1e-4),
]


def make_weights(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def make_optimizer(kind: Optim, weights: list[Tensor]) -> torch.optim.Optimizer:
    named = [(f"w{index}", weight) for index, weight in enumerate(weights)]
    optimizer = build_optimizer(kind, named, torch.tensor(kind.lr))
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    return optimizer


def make_step(
    kind: Optim, weights: list[Tensor], seed: int | None = None
) -> tuple[HalfStorageStep, torch.optim.Optimizer]:
    optimizer = make_optimizer(kind, weights)
    return HalfStorageStep(optimizer, weights, seed), optimizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMS, ids=lambda kind: kind.kind)
def test_a_step_is_an_fp32_step_rounded_once(
    kind: Optim, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_storage, "CHUNK", 20)
    weights = make_weights(dtype)
    weights[2] = weights[2].float()  # of an fp32 island
    half_step, optimizer = make_step(kind, weights)
    assert len(half_step.chunks) > 2
    assert [index for chunk in half_step.chunks for index in chunk] == list(range(len(SHAPES)))
    for chunk in half_step.chunks:
        assert len(chunk) == 1 or sum(weights[index].numel() for index in chunk) <= 20

    for number in range(3):
        gradients: list[Tensor | None] = [0.1 * torch.randn(shape) for shape in SHAPES]
        if number == 1:
            gradients[1] = None
        wide = [weight.float().clone() for weight in weights]
        for copy, gradient in zip(wide, gradients, strict=True):
            copy.grad = None if gradient is None else gradient.clone()
        exact = make_optimizer(kind, wide)
        for copy, weight in zip(wide, weights, strict=True):
            exact.state[copy] = {k: v.float().clone() for k, v in optimizer.state[weight].items()}
        exact.step()

        half_step.step(gradients, torch.tensor([number]))
        for copy, weight in zip(wide, weights, strict=True):
            assert weight.grad is None
            assert torch.equal(weight, copy.to(weight.dtype))
            for key, value in optimizer.state[weight].items():
                assert torch.equal(value, exact.state[copy][key].to(value.dtype)), key
    assert [weight.dtype for weight in weights] == [dtype, dtype, torch.float32, dtype, dtype]


def stochastic_step(seed: int, applied: int) -> list[Tensor]:
    """Two equal bf16 weights, and an fp32 one, after an update of half a bf16 step."""
    weights = [torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16(), torch.ones(4096)]
    half_step, _ = make_step(Sgd(kind="sgd", lr=1.0), weights, seed)
    half_step.step([torch.full((4096,), -(2.0**-8))] * 3, torch.tensor([applied]))
    return weights


def test_stochastic_rounding_has_noise_of_its_own_for_each_weight_step_and_seed() -> None:
    first, second, in_island = stochastic_step(seed=0, applied=0)
    assert torch.equal(first, stochastic_step(seed=0, applied=0)[0])
    assert bool((in_island == 1.0 + 2.0**-8).all())  # fp32 holds it
    for other in (second, stochastic_step(1, 0)[0], stochastic_step(0, 1)[0]):
        assert abs((first == other).double().mean().item() - 0.5) < 0.05
    assert abs(first.double().mean().item() - (1.0 + 2.0**-8)) < 0.0005


def test_nearest_rounding_loses_the_same_update() -> None:
    weights: list[Any] = [torch.ones(4096).bfloat16()]
    half_step, _ = make_step(Sgd(kind="sgd", lr=1.0), weights)
    half_step.step([torch.full((4096,), -(2.0**-8))], torch.tensor([0]))
    assert bool((weights[0] == 1.0).all())
