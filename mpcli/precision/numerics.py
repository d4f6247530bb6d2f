"""What a precision mode means: which tensors are stored and computed in which type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import assert_never

import torch

from mpcli.recipe.precision import Mode


@dataclass(frozen=True)
class Numerics:
    """A precision mode as data.

    Attributes:
        autocast: type of the operations that autocast runs in half precision, or None where
            every operation runs in the type of its inputs.
    """

    mode: Mode
    autocast: torch.dtype | None


def numerics(mode: Mode) -> Numerics:
    """The meaning of `mode`, the same on every device.

    `fp16` and `bf16` are mixed precision in the sense of Micikevicius et al., "Mixed Precision
    Training" (ICLR 2018), sections 3.1 to 3.3: fp32 weights, half-precision convolutions and
    matrix products with fp32 accumulation, and in fp16 a scaled loss.
    """
    match mode:
        case "fp32":
            return Numerics(mode, None)
        case "bf16":
            return Numerics(mode, torch.bfloat16)
        case "fp16":
            return Numerics(mode, torch.float16)
        case _:
            assert_never(mode)


def autocast(meaning: Numerics, device: torch.device) -> AbstractContextManager[object]:
    """The region in which forward runs; made once per run and entered at every step."""
    if meaning.autocast is None:
        return contextlib.nullcontext()
    return torch.amp.autocast(device.type, dtype=meaning.autocast)


@contextlib.contextmanager
def exact_sums() -> Iterator[None]:
    """Keep fp32 products in fp32 and sum half-precision products in fp32, as the modes promise.

    By default torch lets cuDNN round fp32 convolutions to TF32, and cuBLAS add up partial sums
    in half precision.
    """
    # torch.backends.cudnn.rnn is shadowed by a submodule, so that `fp32_precision` cannot reach
    # it; `allow_tf32` sets convolutions and RNNs together.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [
        (matmul, "allow_tf32"),
        (cudnn, "allow_tf32"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
    ]
    before = [getattr(module, name) for module, name in switches]
    try:
        for module, name in switches:
            setattr(module, name, False)
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
