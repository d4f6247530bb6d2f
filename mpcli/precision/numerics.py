"""What a precision mode means: which tensors are stored and computed in which type."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import assert_never

import torch

from mpcli.precision.cpu_autocast import cuda_autocast_policy
from mpcli.precision.softmax import softmax_in_fp32
from mpcli.recipe.precision import Mode, Precision


@dataclass(frozen=True)
class Numerics:
    """A precision mode as data.

    Attributes:
        weights: type that parameters and gradients are stored in, and the optimizer's state where
            there are no masters.
        compute: type of convolutions and matrix products.
        masters: whether the optimizer steps fp32 copies, from which the weights are rounded after
            each step. Norms then keep fp32 weights and compute in fp32.
        tf32: whether tensor cores may round the inputs of fp32 products to 10 bits of mantissa.
    """

    mode: Mode
    weights: torch.dtype
    compute: torch.dtype
    masters: bool = False
    tf32: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        """Type that autocast chooses where it is safe; None where types follow from storage."""
        return self.compute if self.weights != self.compute else None

    @property
    def compute_name(self) -> str:
        """The number format of products: `fp32`, `tf32`, `fp16` or `bf16`."""
        return self.mode.partition("-")[0]

    @property
    def half_weights(self) -> bool:
        """Whether parameters are stored in 16 bits."""
        return self.weights != torch.float32


def numerics(mode: Mode) -> Numerics:
    """The meaning of `mode`, the same on every device.

    `fp16` and `bf16` are mixed precision in the sense of Micikevicius et al., "Mixed Precision
    Training" (ICLR 2018): fp32 weights (section 3.1, Apex's O1), half-precision convolutions and
    matrix products with fp32 accumulation (3.3), and in fp16 a scaled loss (3.2). `*-master`
    stores weights and activations in half beside an fp32 master copy (3.1, Apex's O2); `*-pure`
    stores everything in half and nothing else (Apex's O3).
    """
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    match mode:
        case "fp32":
            return Numerics(mode, fp32, fp32)
        case "tf32":
            return Numerics(mode, fp32, fp32, tf32=True)
        case "fp16":
            return Numerics(mode, fp32, fp16)
        case "bf16":
            return Numerics(mode, fp32, bf16)
        case "fp16-master":
            return Numerics(mode, fp16, fp16, masters=True)
        case "bf16-master":
            return Numerics(mode, bf16, bf16, masters=True)
        case "fp16-pure":
            return Numerics(mode, fp16, fp16)
        case "bf16-pure":
            return Numerics(mode, bf16, bf16)
        case _:
            assert_never(mode)


def autocast(meaning: Numerics, device: torch.device) -> AbstractContextManager[object]:
    """The region in which forward runs; made once per run and entered at every step."""
    if meaning.autocast is None:
        return contextlib.nullcontext()
    return torch.amp.autocast(device.type, dtype=meaning.autocast)


@contextlib.contextmanager
def numeric_settings(precision: Precision, device: torch.device) -> Iterator[None]:
    """torch's global switches as the mode promises, put back afterwards.

    By default torch lets cuDNN round fp32 convolutions to TF32, cuBLAS add up partial sums in
    half precision, CPU autocast keep softmax and norms in half, and attention layers take another
    path in evaluation than in training.
    """
    # torch.backends.cudnn.rnn is shadowed by a submodule, so that `fp32_precision` cannot reach
    # it; `allow_tf32` sets convolutions and RNNs together.
    meaning = numerics(precision.mode)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [
        (matmul, "allow_tf32", meaning.tf32),
        (cudnn, "allow_tf32", meaning.tf32),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
    ]
    before = [getattr(module, name) for module, name, _ in switches]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        if meaning.autocast and device.type == "cpu":
            stack.enter_context(cuda_autocast_policy())
        if meaning.half_weights and "softmax" in precision.sensitive_layers:
            stack.enter_context(softmax_in_fp32(device))
        try:
            for module, name, value in switches:
                setattr(module, name, value)
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for (module, name, _), value in zip(switches, before, strict=True):
                setattr(module, name, value)
