"""Kernels of our own for the operators of torch, for as long as they are wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from mpcli import __version__

Kernel = Callable[..., Any]


@contextlib.contextmanager
def dispatcher_kernels(
    kernels: Iterable[tuple[str, Kernel]], key: str, name: str
) -> Iterator[None]:
    """Register kernels for operators of `aten` under a dispatch key, in the whole process.

    Args:
        kernels: operator (`softmax.int`) and kernel.
        name: what they are for: compiled code that torch keeps on disk does not know of them, so
            it is kept apart by this name.
    """
    config = torch.compiler.config
    tag = f"{config.cache_key_tag}+{name}-{__version__}"
    with (
        config.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
        torch.library._scoped_library("aten", "IMPL") as library,
    ):
        for operator, kernel in kernels:
            library.impl(operator, kernel, key)
        yield
