"""A recipe's model and a batch as tensors that have shapes, types and a device, but no memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mpcli.data.batch import Batch
from mpcli.recipe.recipe import Recipe
from mpcli.tasks import Dataset, apply_activation_checkpointing, task_of


def meta_model(recipe: Recipe, data: Dataset) -> nn.Module:
    """The fp32 model, on the meta device.

    Constructors may read numbers, which meta tensors allow and fake ones do not.

    Raises:
        UserError: there is no such model, or it has nothing to recompute.
    """
    with torch.device("meta"):
        model = task_of(recipe.task).build_model(recipe.task, data.info)
    if recipe.engine.activation_checkpointing:
        apply_activation_checkpointing(model)
    return model


def make_fake(
    model: nn.Module, example: Batch, device: torch.device, mode: FakeTensorMode
) -> Batch:
    """Make a model's tensors fake in place, and those of a batch; `mode` is entered."""
    # Fake tensors of a device that is absent (said already) cannot be made.
    place = device if device.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")
    # What torch remembers of tensors that it made fake would keep `convert` from replacing them.
    mode.fake_tensor_converter.set_tensor_memo = _forget  # type: ignore[method-assign, assignment]
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    model._apply(partial(_fake, device=place))
    for first, *others in names.values():  # `_apply` gives each module its own
        for name in others:
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._parameters[attribute] = model.get_parameter(first)
    tensors = {name: _fake(tensor, place) for name, tensor in example.tensors.items()}
    return Batch(tensors, example.weights)


def _forget(original: Tensor, fake: Tensor) -> None:
    """In the place of what remembers."""


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    shape, stride = tensor.shape, tensor.stride()
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=device)
