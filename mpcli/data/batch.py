"""What a training step consumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Named tensors, whose first dimension counts the samples.

    `Batch({"inputs": images, "targets": labels})["inputs"]` is `images`.

    Args:
        tensors: one at least, all of the same length.
        weights: how many things the loss sums over each sample (its masked tokens, say), known on
            the host; None: one per sample.
    """

    tensors: Mapping[str, Tensor]
    weights: tuple[int, ...] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        """The number of samples."""
        return len(next(iter(self.tensors.values())))

    @property
    def weight(self) -> int:
        """How many things the loss of the batch sums."""
        return len(self) if self.weights is None else sum(self.weights)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; nobody waits for a copy to a GPU."""
        tensors = {
            name: _pinned(t, device).to(device, non_blocking=True)
            for name, t in self.tensors.items()
        }
        return Batch(tensors, self.weights)

    def share(self, rank: int, world_size: int) -> Batch:
        """What one of several ranks trains on: neighbouring samples, as many as others or one more.

        All shares, one after the other, are the batch.
        """
        if world_size == 1:
            return self
        place = share_of(len(self), rank, world_size)
        tensors = {name: tensor[place] for name, tensor in self.tensors.items()}
        return Batch(tensors, None if self.weights is None else self.weights[place])

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` samples, in order."""
        if size >= len(self):
            return [self]
        cut = {name: tensor.split(size) for name, tensor in self.tensors.items()}
        parts = (
            dict(zip(cut, tensors, strict=True)) for tensors in zip(*cut.values(), strict=True)
        )
        if self.weights is None:
            return [Batch(part) for part in parts]
        starts = range(0, len(self), size)
        return [
            Batch(part, self.weights[start : start + size])
            for part, start in zip(parts, starts, strict=True)
        ]


def share_of(num_samples: int, rank: int, world_size: int) -> slice:
    """Which samples of a global batch a rank trains on: the first ranks have one more."""
    each, more = divmod(num_samples, world_size)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def micro_batch_sizes(num_samples: int, rank: int, world_size: int, size: int) -> list[int]:
    """Samples in each micro-batch of a rank's share of a global batch."""
    place = share_of(num_samples, rank, world_size)
    starts = range(place.start, place.stop, size)
    return [min(size, place.stop - start) for start in starts]


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory from which a GPU copies while the host goes on."""
    return tensor.pin_memory() if (tensor.device.type, device.type) == ("cpu", "cuda") else tensor
