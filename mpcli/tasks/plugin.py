"""A plug-in as a task like the others: what its functions return is checked, for they are new."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.recipe.base import Section
from mpcli.recipe.errors import UserError
from mpcli.recipe.plugin import PluginFile, blamed
from mpcli.records import EvalRecord
from mpcli.tasks.base import Dataset

_DATASET = (
    *("num_train", "num_eval", "source", "info"),
    *("example", "prepare", "train_batch", "eval_batches"),
)


class PluginTask:
    """The five names of a plug-in.

    Raises:
        UserError: a function of the plug-in returns what no task returns.
    """

    def __init__(self, plugin: PluginFile) -> None:
        self._plugin = plugin
        self._module: Any = plugin.module

    @property
    def Options(self) -> type[Section]:
        """The schema that the plug-in declares."""
        options: type[Section] = self._module.Options
        return options

    def load_data(self, options: Any, data: Any) -> Dataset:
        """The plug-in's data set."""
        with self._plugin.running():
            dataset = self._module.load_data(options, data)
        if missing := [name for name in _DATASET if not hasattr(dataset, name)]:
            what = f"returned {_about(dataset)}, which has no `{missing[0]}`"
            raise self._plugin.error("load_data", what, "`mpcli.data.TensorDataset` has all of it")
        return _PluginDataset(dataset, self._plugin)

    def build_model(self, options: Any, info: Any) -> nn.Module:
        """The plug-in's model."""
        with self._plugin.running():
            model = self._module.build_model(options, info)
        if not isinstance(model, nn.Module):
            raise self._plugin.error("build_model", f"returned {_about(model)}, not a module")
        return model

    def loss(self, options: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The plug-in's loss."""
        with self._plugin.running():
            returned = self._module.loss(options, model, batch)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            what = f"returned {_about(returned)}, not the sum of the losses and `batch.weight`"
            raise self._plugin.error("loss", what)
        total, weight = returned
        if not isinstance(total, Tensor) or total.shape or total.dtype != torch.float32:
            what = f"returned {_about(total)} as the sum of the losses, not one fp32 number"
            raise self._plugin.error("loss", what)
        if torch.is_grad_enabled() and not total.requires_grad:
            hint = "detached, computed without gradients, or of a model that learns nothing?"
            what = "returned a sum of the losses through which no gradient reaches a weight"
            raise self._plugin.error("loss", what, hint)
        if not isinstance(weight, int | float) or weight != batch.weight:
            found = weight if isinstance(weight, int | float) else _about(weight)
            what = f"returned {found} as the weight of a batch that weighs {batch.weight}"
            raise self._plugin.error("loss", what, "return `batch.weight`")
        return total, batch.weight

    def evaluate(
        self, options: Any, model: nn.Module, batches: Iterable[Batch]
    ) -> dict[str, float]:
        """The plug-in's metrics."""
        with self._plugin.running():
            metrics = self._module.evaluate(options, model, batches)
        if not isinstance(metrics, dict):
            raise self._plugin.error("evaluate", f"returned {_about(metrics)}, not a dict")
        if "loss" not in metrics:
            raise self._plugin.error("evaluate", "returned metrics without the mean `loss`")
        for name, value in metrics.items():
            known = not isinstance(name, str) or name in EvalRecord.model_fields.keys() - {"loss"}
            if known or not isinstance(value, int | float):
                what = f"returned {_about(value)} as the metric {name!r}"
                raise self._plugin.error("evaluate", what, "a metric has a new name and a number")
        return {name: float(value) for name, value in metrics.items()}


class _PluginDataset:
    """The plug-in's data set, whose batches are checked."""

    def __init__(self, dataset: Dataset, plugin: PluginFile) -> None:
        self._dataset = dataset
        self._plugin = plugin

    @property
    def num_train(self) -> int:
        return self._dataset.num_train

    @property
    def num_eval(self) -> int:
        return self._dataset.num_eval

    @property
    def source(self) -> str:
        return self._dataset.source

    @property
    def info(self) -> Any:
        return self._dataset.info

    def prepare(self, device: torch.device) -> None:
        with self._plugin.running():
            self._dataset.prepare(device)

    def example(self, num_samples: int) -> Batch:
        with self._plugin.running():
            batch = self._dataset.example(num_samples)
        return self._checked("example", batch, num_samples)

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        try:
            with self._plugin.running():
                batch = self._dataset.train_batch(seed, step, batch_size)
        except UserError:
            raise
        except Exception as error:  # blamed here, for a traceback does not leave a worker process
            raise blamed(error, self._plugin) or error from error
        return self._checked("train_batch", batch, batch_size)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        for batch in self._dataset.eval_batches(batch_size):
            yield self._checked("eval_batches", batch, None)

    def _checked(self, method: str, batch: Any, num_samples: int | None) -> Batch:
        if not isinstance(batch, Batch):
            what = f"returned a data set whose `{method}` gives {_about(batch)}, not a `Batch`"
            raise self._plugin.error("load_data", what)
        if needing := [name for name, tensor in batch.tensors.items() if tensor.requires_grad]:
            what = f"returned a data set whose `{method}` gives `{needing[0]}` with a gradient"
            raise self._plugin.error("load_data", what, "`.detach()` it")
        lengths = {len(tensor) for tensor in batch.tensors.values()}
        if len(lengths) != 1 or (num_samples is not None and lengths != {num_samples}):
            wanted = "one length" if num_samples is None else f"length {num_samples}"
            what = (
                f"returned a data set whose `{method}` gives tensors of length {sorted(lengths)}, "
                f"not of {wanted}"
            )
            raise self._plugin.error("load_data", what)
        if not batch.weight:
            what = f"returned a data set whose `{method}` gives a batch of weight 0"
            raise self._plugin.error("load_data", what)
        return batch


def _about(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a value of type {type(value).__name__}"
