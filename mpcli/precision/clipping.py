"""Gradient clipping on the device, without a host read."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from mpcli.recipe.train import Clip, ClipAgc, ClipNorm, ClipValue


@torch.no_grad()
def clip_(clip: Clip, gradients: list[Tensor], weights: list[Tensor], grad_norm: Tensor) -> None:
    """Clip unscaled fp32 gradients in place.

    `norm` and `value` do what `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_` do.

    Args:
        gradients: fp32, of any shapes.
        weights: fp32 or half, one per gradient and of its shape; only `agc` reads them.
        grad_norm: fp32 scalar tensor, the L2 norm of all gradients together.
    """
    match clip:
        case ClipNorm():
            torch._foreach_mul_(gradients, (clip.max_norm / (grad_norm + 1e-6)).clamp_max(1.0))
        case ClipValue():
            torch._foreach_clamp_min_(gradients, -clip.clip_value)
            torch._foreach_clamp_max_(gradients, clip.clip_value)
        case ClipAgc():
            _clip_units_(clip, gradients, weights)
        case _:
            assert_never(clip)


def _clip_units_(clip: ClipAgc, gradients: list[Tensor], weights: list[Tensor]) -> None:
    """Adaptive gradient clipping.

    Brock et al., High-Performance Large-Scale Image Recognition Without Normalization, 2021,
    equation 3: a unit's gradient norm is at most `clipping` times its weight norm, which counts
    as `eps` where it is smaller, so that weights that begin at zero can move.
    """
    limits = torch._foreach_clamp_min([_unit_norms(weight) for weight in weights], clip.eps)
    torch._foreach_mul_(limits, clip.clipping)
    norms = [_unit_norms(gradient) for gradient in gradients]
    # Exactly 1, which changes no bit, where the norm is within its limit.
    factors = torch._foreach_div(limits, torch._foreach_maximum(norms, limits))
    torch._foreach_mul_(gradients, factors)


def _unit_norms(tensor: Tensor) -> Tensor:
    """fp32 L2 norms over all dimensions but the first; of the whole of a vector or scalar.

    Slices of the first dimension are the output units of linear layers and convolutions.
    """
    dims = list(range(1, tensor.ndim)) or None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=torch.float32)
    return norms
