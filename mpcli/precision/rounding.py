"""Stochastic rounding from fp32 to bf16, from noise that is a function of its arguments."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_Word = TypeVar("_Word", int, Tensor)


def round_stochastically(values: Tensor, seed: int, step: Tensor, offset: int) -> Tensor:
    """fp32 -> bf16: one of the two neighbours, the nearer one with the higher probability.

    The probability of each is its share of the distance, so the expectation is `values`
    (Gupta et al., Deep Learning with Limited Numerical Precision, 2015, section 3): a small update
    that rounding to nearest would always lose is made now and then. bf16 is the upper half of
    fp32's bits: adding uniform noise to the lower half and cutting it off does just this. Values
    that bf16 holds stay as they are, NaN and infinity too.

    Args:
        step: int64 tensor of one element on the values' device; each step has noise of its own.
        offset: number of the first element among all weights; each weight has noise of its own.
    """
    bits = values.view(torch.int32)
    rounded = (bits + _noise(values, seed, step, offset).to(torch.int32)) & ~0xFFFF
    return torch.where(values.isfinite(), rounded.view(torch.float32), values).bfloat16()


def _noise(values: Tensor, seed: int, step: Tensor, offset: int) -> Tensor:
    """int64 in [0, 2^16), as `values`: counter-based, so no generator's state has to be kept."""
    index = torch.arange(offset, offset + values.numel(), dtype=torch.int64, device=values.device)
    key = _hash((step + _hash(seed & _MASK)) & _MASK)
    return (_hash((index & _MASK) ^ key) >> 16).view(values.shape)


def _hash(x: _Word) -> _Word:
    """A 32-bit integer hash (Wellons' lowbias32); products may wrap around in int64."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & _MASK
    return x ^ (x >> 15)
