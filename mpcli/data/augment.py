"""Flip, crop and cutout of whole batches of small images.

Each augmentation is a finite set of variants of an image: a table holds them all, one random
whole number per image chooses. The numbers are drawn on the CPU for a whole global batch, then
moved: they are the same on every device and however the batch is cut afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class FlipAndCrop:
    """Mirrors half of the images; cuts each out of its zero-padded self at a random place.

    Args:
        size: H, W of the images.
        flip: mirror left-right with probability 1/2.
        crop: pad by max(1, H // 8) pixels on every side, then cut out H x W.
        device: of the images.
    """

    def __init__(
        self, size: tuple[int, int], *, flip: bool, crop: bool, device: torch.device
    ) -> None:
        height, width = size
        self._padding = max(1, height // 8) if crop else 0
        offsets = torch.arange(2 * self._padding + 1)
        ys = offsets[:, None] + torch.arange(height)  # [variants, H], rows of the padded image
        xs = offsets[:, None] + torch.arange(width)
        if flip:
            xs = torch.cat((xs, xs.flip(1)))
        pixels = ys[:, None, :, None] * (width + 2 * self._padding) + xs[None, :, None, :]
        self._pixels = pixels.reshape(-1, 1, height * width).to(device)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """[N, C, H, W] uint8 -> the same shape and type."""
        num_images, channels = images.shape[:2]
        variants = _draw(len(self._pixels), num_images, generator, images.device)
        pixels = self._pixels.index_select(0, variants).expand(-1, channels, -1)
        padded = F.pad(images, (self._padding,) * 4)
        return padded.flatten(2).gather(2, pixels).view(images.shape)


class Cutout:
    """Puts a random square of H // 4 pixels to zero (DeVries & Taylor 2017).

    Args:
        size: H, W of the images. The square lies wholly inside.
        device: of the images.
    """

    def __init__(self, size: tuple[int, int], *, device: torch.device) -> None:
        height, width = size
        side = max(1, height // 4)
        ys = torch.arange(height) - torch.arange(height - side + 1)[:, None]  # [variants, H]
        xs = torch.arange(width) - torch.arange(width - side + 1)[:, None]
        rows, columns = (ys >= 0) & (ys < side), (xs >= 0) & (xs < side)
        squares = rows[:, None, :, None] & columns[None, :, None, :]
        self._squares = squares.reshape(-1, 1, height, width).to(device)

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """[N, C, H, W] float32, normalised, so that zero is the mean; in place."""
        variants = _draw(len(self._squares), len(inputs), generator, inputs.device)
        return inputs.masked_fill_(self._squares.index_select(0, variants), 0.0)


def _draw(
    num_variants: int, num_images: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """[num_images] int64 in [0, num_variants), on the device."""
    pinned = device.type == "cuda"
    variants = torch.randint(num_variants, (num_images,), generator=generator, pin_memory=pinned)
    return variants.to(device, non_blocking=pinned)
