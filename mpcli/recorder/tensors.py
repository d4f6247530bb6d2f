"""Tensors in what people pass around: batches, arguments, outputs, gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves


def floating_tensors(values: Any) -> list[Tensor]:
    """The floating-point tensors in arguments or outputs, those of dataclasses too, in order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif dataclasses.is_dataclass(leaf):
            found += floating_tensors(list(vars(leaf).values()))
    return found


def is_ordinary(tensor: Tensor) -> bool:
    """Whether it holds numbers in strides: not sparse, not nested, not inside of a `vmap`."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.layout == torch.strided and not tensor.is_nested and not wrapped


def named_tensors(batch: Any) -> dict[str, Tensor]:
    """The ordinary tensors of a batch, by their places in it: `['labels']`, `[0]`."""
    places, _ = tree_flatten_with_path(dict(batch) if isinstance(batch, Mapping) else batch)
    return {
        keystr(place) or "batch": leaf
        for place, leaf in places
        if isinstance(leaf, Tensor) and is_ordinary(leaf)
    }


def num_samples(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor; of a list of batches, all of theirs."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, Mapping):
        return next((n for value in batch.values() if (n := num_samples(value))), 0)
    if isinstance(batch, list | tuple):
        if batch and all(isinstance(part, Mapping | list | tuple) for part in batch):
            return sum(map(num_samples, batch))
        return next((n for value in batch if (n := num_samples(value))), 0)
    return 0


@torch.no_grad()
def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm over all of them, fp32 or wider, on the device of the first; 0 without any.

    The sum is taken in fp32: norms above 1.8e19 are infinite.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        values = _stored(gradient)
        groups.setdefault((values.device, values.dtype), []).append(values)
    norms: list[Tensor] = []
    for (_, dtype), group in groups.items():
        wide = torch.float32 if dtype.itemsize < 4 else None
        norms += torch._foreach_norm(group, 2, dtype=wide)
    if not norms:
        return torch.zeros(())
    together = torch.stack([norm.to(norms[0].device) for norm in norms])
    return cast(Tensor, torch.linalg.vector_norm(together))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element is; reads each tensor on the host."""
    return all(bool(torch.isfinite(_stored(tensor)).all()) for tensor in tensors)


def _stored(tensor: Tensor) -> Tensor:
    """The elements that are there, of a sparse tensor too."""
    tensor = tensor.detach()
    return tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
