"""Softmax in fp32 wherever it is called, for models whose weights and activations are half."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def softmax_in_fp32(device: torch.device) -> Iterator[None]:
    """Compute `softmax` and `log_softmax` of half tensors in fp32, forward and backward.

    The results return to half. Kernels for the dispatcher reach the functional calls inside other
    people's attention layers, which have no module to wrap; fused attention does it by itself.
    """
    # What torch.compile keeps on disk does not know of these kernels.
    tag = f"{torch.compiler.config.cache_key_tag}+softmax-in-fp32"
    library = torch.library.Library("aten", "IMPL")
    key = f"Autograd{device.type.upper()}"
    try:
        for name, kernel in (("softmax", torch._softmax), ("log_softmax", torch._log_softmax)):
            library.impl(f"{name}.int", _widened(kernel), key)
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            yield
    finally:
        library._destroy()


def _widened(kernel: Callable[[Tensor, int, bool], Tensor]) -> Callable[..., Tensor]:
    def softmax(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is not None:
            return kernel(values.to(dtype), dim, False)
        if values.dtype in HALF:
            return kernel(values.float(), dim, False).to(values.dtype)
        return kernel(values, dim, False)

    return softmax
