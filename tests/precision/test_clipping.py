"""Gradients are clipped as torch and the papers say, whatever the loss scale was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpcli.precision.clipping import clip_
from mpcli.precision.scaler import LossScaler
from mpcli.recipe.precision import StaticScale
from mpcli.recipe.train import Clip, ClipAgc, ClipNorm, ClipValue
from tests.host_reads import HostReads

CPU = torch.device("cpu")
SHAPES = [(4, 3), (5,), (), (3, 2, 2, 2), (2, 3, 4)]  # linear, bias, scalar, two convolutions
CLIPS: list[Clip] = [
    ClipNorm(kind="norm", max_norm=0.5),
    ClipValue(kind="value", clip_value=0.25),
    ClipAgc(kind="agc", clipping=0.01, eps=1e-3),
]
kinds = pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.kind)
seeds = st.integers(0, 2**31)
sizes = st.floats(1e-6, 1e4)


def some(seed: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * size for shape in SHAPES]


def global_norm(gradients: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clipped(clip: Clip, gradients: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    result = [gradient.clone() for gradient in gradients]
    clip_(clip, result, weights, global_norm(result))
    return result


def torchs(gradients: list[Tensor]) -> list[Tensor]:
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters  # type: ignore[return-value]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(seeds, sizes, st.floats(1e-3, 1e3))
def test_norm_is_that_of_torch(seed: int, size: float, max_norm: float) -> None:
    gradients = some(seed, size)
    parameters = torchs(gradients)
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    ours = clipped(ClipNorm(kind="norm", max_norm=max_norm), gradients, some(0))
    assert equal(ours, [p.grad for p in parameters if p.grad is not None])


@given(seeds, sizes, st.floats(1e-3, 1e3))
def test_value_is_that_of_torch(seed: int, size: float, clip_value: float) -> None:
    gradients = some(seed, size)
    parameters = torchs(gradients)
    torch.nn.utils.clip_grad_value_(parameters, clip_value)
    ours = clipped(ClipValue(kind="value", clip_value=clip_value), gradients, some(0))
    assert equal(ours, [p.grad for p in parameters if p.grad is not None])


@given(seeds, sizes, st.floats(1e-3, 1.0), st.floats(1e-6, 10.0))
def test_agc_is_equation_3(seed: int, size: float, clipping: float, eps: float) -> None:
    gradients, weights = some(seed, size), some(seed + 1)
    ours = clipped(ClipAgc(kind="agc", clipping=clipping, eps=eps), gradients, weights)
    for gradient, weight, result in zip(gradients, weights, ours, strict=True):
        expected = gradient.double().numpy().copy()
        units = [...] if weight.ndim < 2 else range(len(weight))
        for unit in units:
            weight_norm = max(np.linalg.norm(weight.double().numpy()[unit].ravel()), eps)
            gradient_norm = np.linalg.norm(expected[unit].ravel())
            if gradient_norm / weight_norm > clipping:
                expected[unit] *= clipping * weight_norm / gradient_norm
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


@given(seeds, sizes, st.floats(1e-3, 1e3))
def test_the_clipped_norm_is_at_most_the_maximum(seed: int, size: float, max_norm: float) -> None:
    gradients = some(seed, size)
    ours = clipped(ClipNorm(kind="norm", max_norm=max_norm), gradients, some(0))
    assert global_norm(ours) <= max_norm * (1 + 1e-6)  # rounding


@given(seeds, sizes)
def test_norm_keeps_the_direction(seed: int, size: float) -> None:
    gradients = some(seed, size)
    ours = clipped(ClipNorm(kind="norm", max_norm=1e-2), gradients, some(0))
    before, after = (torch.cat([t.flatten() for t in ts]) for ts in (gradients, ours))
    torch.testing.assert_close(after / after.norm(), before / before.norm())


@kinds
@given(seeds, st.integers(-24, 24))
def test_the_loss_scale_changes_no_bit(clip: Clip, seed: int, exponent: int) -> None:
    gradients, weights = some(seed), some(seed + 1)
    scale = 2.0**exponent
    scaled = torch._foreach_mul(gradients, scale)
    LossScaler(StaticScale(kind="static", scale=scale), CPU).unscale_(scaled)
    assert equal(clipped(clip, scaled, weights), clipped(clip, gradients, weights))


@kinds
@given(seeds, st.floats(1e-9, 9e-3))
def test_a_gradient_below_the_limit_keeps_every_bit(clip: Clip, seed: int, share: float) -> None:
    weights = some(seed)
    gradients = torch._foreach_mul(weights, share)
    assert equal(clipped(clip, list(gradients), weights), list(gradients))


@kinds
def test_a_gradient_above_the_limit_is_changed(clip: Clip) -> None:
    gradients = some(0)
    assert not any(
        torch.equal(a, b) for a, b in zip(clipped(clip, gradients, some(1)), gradients, strict=True)
    )


@kinds
def test_a_gradient_of_zeros_stays_zero(clip: Clip) -> None:
    zeros = [torch.zeros(shape) for shape in SHAPES]
    assert equal(clipped(clip, zeros, some(1)), zeros)
    assert equal(clipped(clip, zeros, zeros), zeros)


def test_agc_lets_weights_that_are_zero_move() -> None:
    weight, gradient = torch.zeros(2, 3), torch.ones(2, 3)
    (ours,) = clipped(ClipAgc(kind="agc", clipping=0.1, eps=0.5), [gradient], [weight])
    torch.testing.assert_close(ours.norm(dim=1), torch.full((2,), 0.05))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_agc_takes_the_norms_of_half_weights_in_fp32(dtype: torch.dtype) -> None:
    weights = [weight.to(dtype) for weight in some(1, size=300.0)]  # squares beyond 65504
    gradients = some(2, size=1e4)
    agc = ClipAgc(kind="agc", clipping=0.01, eps=1e-3)
    ours = clipped(agc, gradients, weights)
    assert equal(ours, clipped(agc, gradients, [weight.float() for weight in weights]))
    assert all(gradient.dtype == torch.float32 for gradient in ours)


@kinds
def test_nothing_is_read_by_the_host_and_no_graph_grows(clip: Clip) -> None:
    gradients, weights = some(0), [weight.requires_grad_() for weight in some(1)]
    norm = global_norm(gradients)
    with HostReads() as reads:
        clip_(clip, gradients, weights, norm)
    assert reads.count == 0
    assert not any(gradient.requires_grad for gradient in gradients)
