"""What a training step consumes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A prepared batch on the training device."""

    inputs: Tensor  # [N, C, H, W] float32, normalised
    targets: Tensor  # [N] int64
