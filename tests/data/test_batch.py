"""Batches and their micro-batches."""

from __future__ import annotations

import pytest
import torch

from mpcli.data import Batch


@pytest.mark.parametrize("weights", [None, (3, 0, 2, 1, 1, 0, 4)])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_micro_batches_are_the_batch_in_parts(weights: tuple[int, ...] | None, size: int):
    tensors = {"ids": torch.arange(14).view(7, 2), "label": torch.arange(7)}
    batch = Batch(tensors, weights)
    assert (len(batch), batch.weight) == (7, 7 if weights is None else 11)
    parts = batch.split(size)
    assert max(map(len, parts)) == min(size, 7)
    assert sum(part.weight for part in parts) == batch.weight
    for name, tensor in tensors.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
    for start, part in zip(range(0, 7, size), parts, strict=True):
        assert part.weight == (len(part) if weights is None else sum(weights[start:][:size]))
