"""Small convolutional networks for small images."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class ConvBlock(nn.Module):
    """3x3 convolution, halving of the image if asked for, batch norm, ReLU.

    The norm and the ReLU are bound by memory: after the pooling they are four times cheaper. The
    norm's statistics are those of the pooled values (as in Keller Jordan's airbench).
    """

    def __init__(self, channels_in: int, channels_out: int, *, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.BatchNorm2d(channels_out)
        self.act = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H or H // 2, W or W // 2]."""
        features: Tensor = self.act(self.norm(self.pool(self.conv(images))))
        return features


class SmallNet(nn.Module):
    """Four convolutions; 242,000 parameters at width 32.

    Args:
        channels: of the images.
        size: of the images' shorter side; the first blocks halve it while it is 8 or more.
        num_classes: logits.
        width: channels of the first block; the next two double them.
    """

    def __init__(self, channels: int, size: int, num_classes: int, *, width: int) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width, 4 * width)
        self.blocks = nn.Sequential(
            *(
                ConvBlock(channels_in, channels_out, pool=size >> index >= 8)
                for index, (channels_in, channels_out) in enumerate(pairwise(widths))
            )
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        logits: Tensor = self.head(self.blocks(images).mean((2, 3)))
        return logits


class Residual(nn.Module):
    """The identity plus two convolution blocks of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ConvBlock(channels, channels, pool=False)
        self.block2 = ConvBlock(channels, channels, pool=False)

    def forward(self, images: Tensor) -> Tensor:
        """Shape-preserving."""
        features: Tensor = images + self.block2(self.block1(images))
        return features


class ResNet9(nn.Module):
    """The network of David Page's DAWNBench entry; 6.6 million parameters at width 64.

    "How to train your ResNet", 2018. Logits are scaled by 1/8, as there.
    """

    def __init__(self, channels: int, num_classes: int, *, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ConvBlock(channels, width, pool=False),
            ConvBlock(width, 2 * width, pool=True),
            Residual(2 * width),
            ConvBlock(2 * width, 4 * width, pool=True),
            ConvBlock(4 * width, 8 * width, pool=True),
            Residual(8 * width),
        )
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        logits: Tensor = self.head(self.blocks(images).amax((2, 3)))
        return logits * 0.125
