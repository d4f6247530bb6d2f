"""Activation checkpointing: keep the inputs of blocks, compute their insides again in backward.

Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mpcli.recipe.errors import user_error


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Checkpoint every block of a model, in place; names and numbers stay as they are.

    Blocks are the children, of more than one layer, of the model's outermost `nn.Sequential`s; a
    model of transformers says itself which they are.

    Raises:
        UserError: the model has no blocks.
    """
    if _switched_on(model):
        return
    blocks = list(_blocks(model))
    if not blocks:
        raise user_error(
            "this model has no blocks of several layers whose activations could be recomputed",
            "remove `activation_checkpointing`, or choose another model",
            path="engine.activation_checkpointing",
        )
    for block in blocks:
        # A partial of the block, not a closure: a deep copy of the model then runs itself.
        block.forward = partial(_checkpointed, block)


def _switched_on(model: nn.Module) -> bool:
    """Whether the model is one of transformers that checkpoints its blocks, as it does from now on.

    Its blocks take a cache of keys, which a second forward would fill twice: it leaves that out.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    name = "activation_checkpointing_enable"
    if not hasattr(model, name):  # its name before transformers 5.23
        name = "gradient_checkpointing_enable"
    try:
        getattr(model, name)({"use_reentrant": False})
    except ValueError:  # no part of it does what its class says
        return False
    return True


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        yield from (child for child in module if _num_layers(child) > 1)
    else:
        for child in module.children():
            yield from _blocks(child)


def _num_layers(module: nn.Module) -> int:
    return sum(1 for part in module.modules() if not list(part.children()))


def _checkpointed(block: nn.Module, *inputs: Any) -> Any:
    forward = MethodType(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    if torch.compiler.is_compiling():  # the compiler updates statistics once by itself
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _discarded_statistics(block)


@contextmanager
def _discarded_statistics(block: nn.Module) -> Iterator[None]:
    """Let batch norms update copies of their running statistics, which are then thrown away."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = buffer if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
