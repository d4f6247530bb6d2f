"""Softmax in fp32 wherever it is called, for models whose weights and activations are half."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mpcli.precision.formats import HALF
from mpcli.precision.kernels import dispatcher_kernels


@contextlib.contextmanager
def softmax_in_fp32(device: torch.device) -> Iterator[None]:
    """Compute `softmax` and `log_softmax` of half tensors in fp32, forward and backward.

    The results return to half. Kernels for the dispatcher reach the functional calls inside other
    people's attention layers, which have no module to wrap; fused attention does it by itself.
    """
    kernels = [
        ("softmax.int", _widened(torch._softmax)),
        ("log_softmax.int", _widened(torch._log_softmax)),
    ]
    with dispatcher_kernels(kernels, f"Autograd{device.type.upper()}", "softmax-in-fp32"):
        yield


def _widened(kernel: Callable[[Tensor, int, bool], Tensor]) -> Callable[..., Tensor]:
    def softmax(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is not None:
            return kernel(values.to(dtype), dim, False)
        if values.dtype in HALF:
            return kernel(values.float(), dim, False).to(values.dtype)
        return kernel(values, dim, False)

    return softmax
