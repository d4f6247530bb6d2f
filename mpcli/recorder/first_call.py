"""Hooks that are put into a model when it is first called, if it is not compiled then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn

from mpcli.precision.observe import TypesObserver
from mpcli.recorder.patches import Failures


@contextlib.contextmanager
def at_first_call(
    model: nn.Module, watch: Callable[[], None], failures: Failures
) -> Iterator[None]:
    """In the block, call `watch` when the model, or one of its parts, is first called.

    A compiled function may have the model inside, which shows when it is compiled: then only
    `failures.saw_compiling` is set, by the code that is made, which computes what it would without.

    Args:
        watch: may register hooks, those of the module that is being called too.
    """
    has_begun = False

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal has_begun
        if torch.compiler.is_compiling():
            failures.saw_compiling = True
            return
        if has_begun:
            return
        has_begun = True
        known = set(module._forward_pre_hooks)
        watch()
        for number, hook in list(module._forward_pre_hooks.items()):
            if number not in known:  # it came too late for this call
                named = number in module._forward_pre_hooks_with_kwargs
                hook(module, args, kwargs) if named else hook(module, args)

    handles = [
        module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
        for module in {model, *_parts(model)}
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """The children that loops call themselves, and those in containers of them."""
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child)
        else:
            yield child


class LoopObserver(TypesObserver):
    """Of a model in a loop that is not ours: it fails alone, and a copy of the model is not seen.

    Attributes:
        has_observed: whether it was entered, and left again.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, failures: Failures) -> None:
        super().__init__(model)
        self.has_observed = self._is_observing = False

        def guarded(method: Callable[..., None]) -> Callable[..., None]:
            def hook(module: nn.Module, *about: Any) -> None:
                if self._is_observing and module in self._names:
                    method(module, *about)

            return failures.safe(hook)

        # Plain functions: `copy.deepcopy` of the model would copy methods, and this with them.
        self._enter_module = guarded(self._enter_module)  # type: ignore[method-assign]
        self._leave_module = guarded(self._leave_module)  # type: ignore[method-assign]

    def __enter__(self) -> Self:
        self._is_observing = True
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._is_observing, self.has_observed = False, True
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, torch._ops.OpOverload):  # such as flex attention
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)
