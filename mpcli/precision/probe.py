"""Looking at a model while it trains: the outputs of its modules, and the gradients of those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mpcli.precision.statistics import Key, Kind, Samples

MAX_CALLS = 4
"""Calls of one module within a step that are looked at: of a recurrent loop, the first ones."""


def probed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that compute something themselves, by name: leaves, and owners of parameters."""
    return {
        name: module
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
        or any(True for _ in module.parameters(recurse=False))
    }


class ActivationHooks:
    """While it is entered, `samples` gets every output of a probed module and its gradient.

    The hooks are there only then, so other steps cost nothing. An output is looked at right after
    its module made it, before an operation in place can change it. What activation checkpointing
    computes again in backward does not count again.

    Args:
        model: run by its own code: what is compiled has no hooks, see `torch.compiler.set_stance`.
        samples: of this step.
    """

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        self._modules = probed_modules(model)
        self._samples = samples
        self._calls: Counter[str] = Counter()
        self._seen: set[Key] = set()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [
            module.register_forward_hook(partial(self._after_forward, name))
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _after_forward(self, name: str, module: nn.Module, inputs: object, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # computed again, in backward
            return
        call = self._calls[name]
        self._calls[name] += 1
        if call >= MAX_CALLS:
            return
        for number, tensor in enumerate(dense_tensors(output)):
            label = name if number == 0 else f"{name}[{number}]"
            with _disable_current_modes():  # an observer counts the model's own operations
                self._samples.add(tensor, Key(name, "output", label, call))
            # A hook on a leaf (a parameter that is an output) would outlive the step.
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(self._of_gradient(Key(name, "grad_output", label, call)))

    def _of_gradient(self, key: Key) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if key not in self._seen:  # the first of several backwards
                self._seen.add(key)
                self._samples.add(gradient, key, scaled=True)

        return look


def dense_tensors(values: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output whose elements can be looked at."""
    return [
        leaf
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.layout is torch.strided
        and not leaf.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(leaf)
    ]


def parameter_key(name: str, kind: Kind) -> Key:
    """The key of a parameter's tensor, by the name that the model gives it."""
    return Key(name.rpartition(".")[0], kind, name)
