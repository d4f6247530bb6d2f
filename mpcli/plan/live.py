"""Bytes that a computation holds on to, whether its tensors are real or fake."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_DEVICE = torch.ops.prim.device.default
_INDEX_PUT = torch.ops.aten.index_put.default
_READ = torch.ops.aten._local_scalar_dense.default

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def _columns(func: Any, args: Any) -> int:
    """Bytes that a half convolution takes for a while on a CPU whose oneDNN has none.

    torch's own one makes a matrix of its whole input, with a copy of each pixel for each place of
    the kernel that it meets.
    """
    backward = func is _CONVOLUTIONS[1]
    inputs, weight = args[1:3] if backward else args[:2]
    if inputs.device.type != "cpu" or weight.dim() != 4 or not _lacks(inputs.dtype):
        return 0
    stride, padding, dilation, transposed = args[4:8] if backward else args[3:7]
    groups = args[9] if backward else args[8]
    if transposed or groups > 1:
        return 0
    pixels = math.prod(
        (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, gap in zip(
            inputs.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    return int(len(inputs) * math.prod(weight.shape[1:]) * pixels * inputs.itemsize)


@functools.cache
def _lacks(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


class LiveStorages(TorchDispatchMode):
    """Notes when each storage is made and when it is freed, while the mode is entered.

    Views share a storage, operations in place make none, and what a kernel uses inside does not
    show. It is made for fake tensors: a number that the host reads of one is 1, a truth is false,
    and what only writes into its arguments is not run.

    Attributes:
        sizes: bytes of each storage, in the order in which they were made; their places in it are
            the numbers that other attributes and methods speak of.
        events: number of each storage that was made, and -1 - number of each that was freed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.events: list[int] = []
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device
        if func is _READ and args[0].constant is None:
            return False if args[0].dtype == torch.bool else 1
        if not func._schema.returns:  # fused and foreach kernels, many without a fake form
            return None
        if func is _INDEX_PUT and torch._C._current_graph_task_id() != -1:
            return args[0]  # of real tensors, the backward of an indexing writes in place
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numbers(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if func in _CONVOLUTIONS and (columns := _columns(func, args)):
            self.sizes.append(columns)
            self.events += [len(self.sizes) - 1, -len(self.sizes)]
        return result

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """Of the storages of some tensors, which count from now on if they did not."""
        return {self._number(tensor.untyped_storage()) for tensor in tensors}

    def _number(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._alive:
            number = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.events.append(number)
            freed = weakref.ref(storage, lambda _: self._freed(key))
            self._alive[key] = number, freed
        return self._alive[key][0]

    def _freed(self, key: int) -> None:
        number, _ = self._alive.pop(key)
        self.events.append(-1 - number)

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """Of storages together."""
        return sum(self.sizes[number] for number in numbers)

    def alive(self) -> set[int]:
        """The storages that are there now."""
        return {number for number, _ in self._alive.values()}
