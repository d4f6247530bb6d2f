"""A whole data set in the training device's memory, and the batches made from it there."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from mpcli.data.augment import Cutout, FlipAndCrop
from mpcli.data.batch import Batch
from mpcli.data.images import DatasetInfo, Split, Splits
from mpcli.data.seeds import derive_seed


class ImageDataset:
    """Images as uint8 on `device`; normalised and augmented in whole batches there.

    Args:
        splits: images and labels, on the CPU.
        info: the data set in numbers.
        augment: any of `flip`, `crop`, `cutout`; always applied in that order.
        device: where batches are made.
        channels_last: make inputs in NHWC memory format.
    """

    def __init__(
        self,
        splits: Splits,
        info: DatasetInfo,
        *,
        augment: Collection[str],
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        self.info = info
        mean, std = mean_and_std(splits.train.images)
        self._mean = mean.view(1, -1, 1, 1).to(device)
        self._scale = (1 / std).view(1, -1, 1, 1).to(device)
        self._train = Split(*(tensor.to(device) for tensor in splits.train))
        self._eval = Split(*(tensor.to(device) for tensor in splits.eval))
        flip, crop, size = "flip" in augment, "crop" in augment, info.input_shape[1:]
        self._flip_and_crop = (
            FlipAndCrop(size, flip=flip, crop=crop, device=device) if flip or crop else None
        )
        self._cutout = Cutout(size, device=device) if "cutout" in augment else None
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._generator = torch.Generator()
        self._shuffled: tuple[tuple[int, int], Tensor] | None = None

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The global batch of an attempted step: a function of the arguments alone.

        Every epoch is a fresh permutation; its last incomplete batch is dropped.

        Args:
            seed: of the run.
            step: attempted steps before this one, from 0.
            batch_size: of the whole global batch, at most `info.num_train`.
        """
        epoch, position = divmod(step, self.info.num_train // batch_size)
        chosen = self._order(seed, epoch)[position * batch_size : (position + 1) * batch_size]
        images = self._train.images.index_select(0, chosen)
        targets = self._train.labels.index_select(0, chosen)
        if self._flip_and_crop or self._cutout:
            self._generator.manual_seed(derive_seed(seed, "augment", step))
        if self._flip_and_crop:
            images = self._flip_and_crop(images, self._generator)
        inputs = self._normalise(images)
        if self._cutout:
            inputs = self._cutout(inputs, self._generator)
        return Batch(inputs, targets)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The evaluation split in its own order, without augmentation; the last may be smaller."""
        for start in range(0, self.info.num_eval, batch_size):
            part = slice(start, start + batch_size)
            yield Batch(self._normalise(self._eval.images[part]), self._eval.labels[part])

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The permutation of the training split in an epoch: [num_train] int64, on the device."""
        if self._shuffled is None or self._shuffled[0] != (seed, epoch):
            self._generator.manual_seed(derive_seed(seed, "order", epoch))
            order = torch.randperm(self.info.num_train, generator=self._generator)
            self._shuffled = (seed, epoch), order.to(self._device)
        return self._shuffled[1]

    def _normalise(self, images: Tensor) -> Tensor:
        # Two roundings, not a fused multiply-add: the same bits on every device.
        inputs = images.to(torch.float32, memory_format=self._format)
        return inputs.sub_(self._mean).mul_(self._scale)


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the pixels, from exact counts of their values.

    Args:
        images: [N, C, H, W] uint8, on the CPU.

    Returns:
        Two float32 tensors [C]. A constant channel gets the standard deviation 1.
    """
    counts = torch.stack(
        [torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(1)]
    ).double()
    values = torch.arange(256, dtype=torch.float64)
    pixels = images.numel() // images.shape[1]
    mean = counts @ values / pixels
    variance = (counts * (values - mean.unsqueeze(1)).square()).sum(1) / pixels
    std = torch.where(variance > 0, variance.sqrt(), 1.0)
    return mean.float(), std.float()
