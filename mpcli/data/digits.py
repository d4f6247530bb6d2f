"""scikit-learn's digits: 1,797 real handwritten digits of 8x8 pixels.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch

from mpcli.data.images import ImageInfo, Split, Splits
from mpcli.recipe.errors import Exit, user_error

INFO = ImageInfo(
    num_train=1437,
    num_eval=360,
    input_shape=(1, 8, 8),
    num_classes=10,
    source="scikit-learn's digits (embedded)",
    classes=tuple("0123456789"),
)
KNOWN = 'pip install "scikit-learn==1.9.1"'


def load() -> Splits:
    """Pixels are 0..16. Every fifth example of the examples sorted by class is held out.

    Raises:
        UserError: exit 3, a scikit-learn without them.
    """
    # The file that `sklearn.datasets.load_digits` reads; to import that takes two seconds.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    if not Path(str(file)).is_file():
        raise user_error(
            "the installed scikit-learn has no digits", KNOWN, exit_code=Exit.ENVIRONMENT
        )
    rows = torch.from_numpy(np.loadtxt(str(file), delimiter=","))
    images = rows[:, :-1].to(torch.uint8).reshape(-1, 1, 8, 8)
    labels = rows[:, -1].to(torch.int64)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[torch.argsort(labels, stable=True)[::5]] = True
    return Splits(
        Split(images[~held_out], labels[~held_out]), Split(images[held_out], labels[held_out])
    )
