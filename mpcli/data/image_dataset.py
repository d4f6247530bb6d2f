"""Labelled images, and the batches made of them: on the training device where they fit there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from mpcli.data.augment import Cutout, FlipAndCrop
from mpcli.data.batch import Batch
from mpcli.data.images import ImageInfo, Split, Splits
from mpcli.data.order import EpochOrder
from mpcli.data.seeds import derive_seed
from mpcli.recipe.data import Normalise


class ImageDataset:
    """Images as uint8; normalised and augmented in whole batches where they are.

    That is the memory of the training device, or the disk, through a memory map, where the device
    has no room for them. The batches are the same.

    Args:
        info: the data set in numbers, from names and metadata.
        read: both splits, on the CPU, and the numbers as they then are.
        augment: any of `flip`, `crop`, `cutout`; always applied in that order.
        channels_last: make inputs in NHWC memory format.
        normalise: mean and deviation of each channel; None: those of the training images.

    Attributes:
        mean: that is taken from each channel, fp32 [C] on the CPU; `std` likewise. Known after
            `prepare`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        info: ImageInfo,
        read: Callable[[], tuple[Splits, ImageInfo]],
        *,
        augment: Collection[str],
        channels_last: bool = False,
        normalise: Normalise | None = None,
    ) -> None:
        self.info = info
        self._read = read
        self._augment = augment
        self._given = normalise
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def num_train(self) -> int:
        """Images to learn from."""
        return self.info.num_train

    @property
    def num_eval(self) -> int:
        """Images to evaluate on."""
        return self.info.num_eval

    @property
    def source(self) -> str:
        """Where the images come from, in words."""
        return self.info.source

    def example(self, num_samples: int) -> Batch:
        """A batch without content."""
        inputs = torch.empty(num_samples, *self.info.input_shape, memory_format=self._format)
        return _batch(inputs, torch.zeros(num_samples, dtype=torch.int64))

    def prepare(self, device: torch.device) -> None:
        """Read all images; batches are on `device` from now on.

        Raises:
            UserError: exit 3, when the data is missing or damaged.
        """
        splits, self.info = self._read()
        if self._given is None:
            self.mean, self.std = mean_and_std(splits.train.images)
        else:
            self.mean, self.std = torch.tensor(self._given.mean), torch.tensor(self._given.std)
        self._device = device
        device = device if _fit(splits, device) else torch.device("cpu")
        self._mean = self.mean.view(1, -1, 1, 1).to(device)
        self._scale = (1 / self.std).view(1, -1, 1, 1).to(device)
        self._train = Split(*(tensor.to(device) for tensor in splits.train))
        self._eval = Split(*(tensor.to(device) for tensor in splits.eval))
        augment, size = self._augment, self.info.input_shape[1:]
        flip, crop = "flip" in augment, "crop" in augment
        self._flip_and_crop = (
            FlipAndCrop(size, flip=flip, crop=crop, device=device) if flip or crop else None
        )
        self._cutout = Cutout(size, device=device) if "cutout" in augment else None
        self._order = EpochOrder(self.num_train, device)
        self._generator = torch.Generator()

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The global batch of an attempted step (from 0): a function of the arguments alone."""
        chosen = self._order.chosen(seed, step, batch_size)
        images = self._train.images.index_select(0, chosen)
        targets = self._train.labels.index_select(0, chosen)
        if self._flip_and_crop or self._cutout:
            self._generator.manual_seed(derive_seed(seed, "augment", step))
        if self._flip_and_crop:
            images = self._flip_and_crop(images, self._generator)
        inputs = self._normalise(images)
        if self._cutout:
            inputs = self._cutout(inputs, self._generator)
        return _batch(inputs, targets).to(self._device)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """The evaluation split in its own order, without augmentation; the last may be smaller."""
        for start in range(0, self.num_eval, batch_size):
            part = slice(start, start + batch_size)
            inputs = self._normalise(self._eval.images[part])
            yield _batch(inputs, self._eval.labels[part]).to(self._device)

    def _normalise(self, images: Tensor) -> Tensor:
        # Two roundings, not a fused multiply-add: the same bits on every device.
        inputs = images.to(torch.float32, memory_format=self._format)
        return inputs.sub_(self._mean).mul_(self._scale)


def _fit(splits: Splits, device: torch.device) -> bool:
    """Whether the images take at most half of the memory that a GPU has left."""
    if device.type != "cuda":
        return True
    size = sum(split.images.nbytes for split in splits)
    return size <= torch.cuda.mem_get_info(device)[0] / 2


def _batch(inputs: Tensor, targets: Tensor) -> Batch:
    """`inputs`: [N, C, H, W] float32, normalised; `targets`: [N] int64."""
    return Batch({"inputs": inputs, "targets": targets})


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the pixels, from exact counts of their values.

    Args:
        images: [N, C, H, W] uint8, on the CPU.

    Returns:
        Two float32 tensors [C]. A constant channel gets the standard deviation 1.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for some in images.split(4096):  # the images may be more than memory holds
        for channel, count in zip(some.unbind(1), counts, strict=True):
            count += torch.bincount(channel.reshape(-1), minlength=256)
    values = torch.arange(256, dtype=torch.float64)
    pixels = images.numel() // images.shape[1]
    mean = counts @ values / pixels
    variance = (counts * (values - mean.unsqueeze(1)).square()).sum(1) / pixels
    std = torch.where(variance > 0, variance.sqrt(), 1.0)
    return mean.float(), std.float()
