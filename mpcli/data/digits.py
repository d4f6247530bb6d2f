"""scikit-learn's digits: 1,797 real handwritten digits of 8x8 pixels.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

import torch

from mpcli.data.images import ImageInfo, Split, Splits
from mpcli.signals import uninterrupted

INFO = ImageInfo(
    num_train=1437,
    num_eval=360,
    input_shape=(1, 8, 8),
    num_classes=10,
    source="scikit-learn's digits (embedded)",
    classes=tuple("0123456789"),
)


def load() -> Splits:
    """Pixels are 0..16. Every fifth example of the examples sorted by class is held out."""
    with uninterrupted():
        from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[torch.argsort(labels, stable=True)[::5]] = True
    return Splits(
        Split(images[~held_out], labels[~held_out]), Split(images[held_out], labels[held_out])
    )
