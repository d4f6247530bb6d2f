"""From a recipe's `data` section to batches on the training device."""

from mpcli.data.batch import Batch
from mpcli.data.tensors import TensorDataset

__all__ = ["Batch", "TensorDataset"]
