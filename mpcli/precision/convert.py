"""A model as its mode stores and computes it: half-precision weights, fp32 islands."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mpcli.precision.formats import HALF
from mpcli.precision.numerics import Numerics
from mpcli.precision.sensitive import last_layer


def convert(
    model: nn.Module,
    meaning: Numerics,
    device: torch.device,
    fp32_modules: Collection[str],
    *,
    round_parameters: bool = True,
) -> None:
    """Make an fp32 model store and compute what the mode says, in place.

    Modules with half weights cast their inputs to half, as FSDP2's mixed precision does: fp32 may
    come from the data, from an island, or from a tensor made in a forward.

    Args:
        device: that the model runs on.
        fp32_modules: names of the modules that become fp32 islands: they keep fp32 weights and
            run with autocast off on fp32 inputs, so their backward is fp32 too. Their outputs
            return to the half type of their neighbours. The last layer's stay in fp32: nothing
            follows it but the loss.
        round_parameters: off where something else rounds half weights for each forward.
    """
    if meaning.weights == meaning.compute == torch.float32:
        return
    inside = modules_inside(model, fp32_modules)
    if meaning.half_weights:
        to_half = partial(_cast, source=(torch.float32,), target=meaning.weights)
        for module in model.modules():
            if module not in inside:
                if round_parameters:
                    module._apply(to_half, recurse=False)
                else:
                    module._buffers.update({n: to_half(b) for n, b in module._buffers.items()})
                if module is model or any(True for _ in module.parameters(recurse=False)):
                    module.forward = partial(_with_half_inputs, module.forward, meaning.weights)
    last = model.get_submodule(last_layer(model))
    for island in outermost_islands(model, fp32_modules):
        neighbours = meaning.weights if meaning.half_weights else None
        keeps = last in island.modules()
        # A partial of the bound method: a deep copy of the model then runs itself.
        island.forward = partial(_in_fp32, island.forward, device.type, neighbours, keeps)


def modules_inside(model: nn.Module, names: Collection[str]) -> set[nn.Module]:
    """The named modules and all that they are made of."""
    return {module for name in names for module in model.get_submodule(name).modules()}


def outermost_islands(model: nn.Module, fp32_modules: Collection[str]) -> set[nn.Module]:
    """Of the fp32 modules, those that are run by others."""
    islands = [model.get_submodule(name) for name in fp32_modules]
    # A list of modules is never run itself: what is in it is.
    run = {island for island in islands if type(island).forward is not nn.Module.forward}
    return run - {module for island in run for module in island.modules() if module is not island}


def _with_half_inputs(
    forward: Callable[..., Any], half: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    args, kwargs = _cast((args, kwargs), (torch.float32,), half)
    return forward(*args, **kwargs)


def _in_fp32(
    forward: Callable[..., Any],
    device: str,
    neighbours: torch.dtype | None,
    keeps_fp32: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`forward` in fp32.

    Args:
        neighbours: type to return to; None under autocast: that of the first half input, if any,
            since autocast takes fp32 from elsewhere as readily.
    """
    back = neighbours or _half_type((args, kwargs))
    args, kwargs = _cast((args, kwargs), HALF, torch.float32)
    with torch.amp.autocast(device, enabled=False):
        outputs = forward(*args, **kwargs)
    if keeps_fp32 or back is None:
        return outputs
    return _cast(outputs, (torch.float32,), back)


def _half_type(inputs: Any) -> torch.dtype | None:
    types = (leaf.dtype for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return next((dtype for dtype in types if dtype in HALF), None)


def _cast(value: Any, source: tuple[torch.dtype, ...], target: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(target) if isinstance(leaf, Tensor) and leaf.dtype in source else leaf

    return cast(value) if isinstance(value, Tensor) else tree_map(cast, value)
