"""What a precision mode means: which tensors are stored and computed in which type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

import torch

from mpcli.recipe.precision import Mode


@dataclass(frozen=True)
class Numerics:
    """A precision mode as data.

    Attributes:
        weights: storage type of parameters; gradients have the same type.
        autocast: type of the operations that autocast runs in half precision, or None where
            every operation runs in the type of its inputs.
    """

    mode: Mode
    weights: torch.dtype
    autocast: torch.dtype | None


def numerics(mode: Mode) -> Numerics:
    """The meaning of `mode`, the same on every device.

    `fp16` and `bf16` are mixed precision in the sense of Micikevicius et al., "Mixed Precision
    Training" (ICLR 2018), sections 3.1 to 3.3: fp32 weights, half-precision convolutions and
    matrix products with fp32 accumulation, and in fp16 a scaled loss.
    """
    match mode:
        case "fp32":
            return Numerics(mode, torch.float32, None)
        case "bf16":
            return Numerics(mode, torch.float32, torch.bfloat16)
        case "fp16":
            return Numerics(mode, torch.float32, torch.float16)
        case _:
            assert_never(mode)


def autocast(meaning: Numerics, device: torch.device) -> torch.amp.autocast:
    """The autocast region in which forward runs; re-entrant, made once per run."""
    return torch.amp.autocast(
        device.type,
        dtype=meaning.autocast or torch.bfloat16,
        enabled=meaning.autocast is not None,
    )


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Keep fp32 products in fp32: torch rounds cuDNN convolutions to TF32 by default."""
    # torch.backends.cudnn.rnn is shadowed by a submodule, so that `fp32_precision` cannot reach
    # it; `allow_tf32` sets convolutions and RNNs together.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
