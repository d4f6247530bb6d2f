"""What is recorded: a model, the optimizer of its weights or of copies of them, and a scaler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcli.precision.observe import types_of
from mpcli.records import ForeignModule, ForeignRun


@dataclass(frozen=True)
class SteppedParameter:
    """A tensor that the optimizer steps, under the name of the model's parameter it stands for."""

    name: str
    tensor: Tensor


def stepped_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[SteppedParameter]:
    """Every tensor that the optimizer steps.

    Those that are not the model's are masters, made by hand. They belong to the parameters that the
    optimizer does not step itself: each to the first one left of its shape, in the model's order.
    Others are named after their places in the optimizer.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    own = {id(tensor) for tensor in tensors}
    left = [(n, p) for n, p in model.named_parameters() if id(p) not in own and p.requires_grad]
    found = []
    for place, tensor in enumerate(tensors):
        name = names.get(id(tensor))
        if name is None:
            match = next((pair for pair in left if pair[1].shape == tensor.shape), None)
            if match:
                left.remove(match)
            name = match[0] if match else f"optimizer.{place}"
        found.append(SteppedParameter(name, tensor))
    return found


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of it runs as compiled code, which hooks would change or never see."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def describe(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    *,
    loop: str,
    settings: Mapping[str, Any],
    every: int,
    device: torch.device,
) -> ForeignRun:
    """`foreign.json`; `settings` are those of the loop itself, where it has any."""
    own = {id(parameter) for parameter in model.parameters()}
    stepped = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    found = {**_simple("", settings), **_simple("optimizer.", group)}
    if scaler is not None:
        names = ("init_scale", "growth_factor", "backoff_factor", "growth_interval", "enabled")
        about = {name: getattr(scaler, f"_{name}", None) for name in names}
        found |= _simple("scaler.", about)
    return ForeignRun(
        loop=loop,
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        optimizer=type(optimizer).__name__,
        scaler=None if scaler is None else type(scaler).__name__,
        every=every,
        device=str(device),
        settings=found,
        modules=tuple(_modules(model)),
        masters=any(id(tensor) not in own for tensor in stepped),
        compiled=is_compiled(model),
    )


def _modules(model: nn.Module) -> Iterator[ForeignModule]:
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            yield ForeignModule(
                name=name,
                type=type(module).__name__,
                parameters=sum(parameter.numel() for parameter in own),
                stored=types_of(own),
            )


def _simple(prefix: str, values: Mapping[str, Any]) -> dict[str, float | bool | str | None]:
    """Numbers, words and pairs of numbers; `betas` become `betas.0` and `betas.1`."""
    found: dict[str, float | bool | str | None] = {}
    for name, value in values.items():
        if isinstance(value, tuple | list):
            found |= _simple(f"{prefix}{name}.", {str(n): part for n, part in enumerate(value)})
        elif isinstance(value, Tensor) and value.numel() == 1:
            found[prefix + name] = value.item()
        elif value is None or isinstance(value, bool | float | int | str):
            found[prefix + name] = value
    return found
