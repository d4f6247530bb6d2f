"""Which types a model really computes in: the operations of a forward, by module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mpcli.precision.formats import dtype_name
from mpcli.records import ModuleTypes

LOSS = "loss"
"""The name of what runs outside the model's forward: the task's loss."""

MOVES = (
    # casts and copies
    *("_to_copy", "clone", "copy_", "_unsafe_view", "unsafe_split", "unsafe_split_with_sizes"),
    *("repeat", "cat", "stack", "constant_pad_nd", "roll", "flip"),
    *("gather", "index", "index_select"),
    # new tensors and what fills them, such as the mask of a dropout
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "fill_", "zero_"),
    *("bernoulli_", "uniform_", "normal_"),
)
"""Operations that compute nothing, besides views."""

COMMUNICATION = frozenset({"c10d", "fsdp"})
"""Libraries of operations that gather weights before a module's forward."""

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "convolution"})
"""Operations that take operands of one type."""


class TypesObserver(TorchDispatchMode):
    """Notes in which types a model computes while the observer is entered, without host reads.

    Every operation on floating-point tensors counts for the innermost running module, under the
    type of its result. What a fused kernel does inside does not show: a batch norm of fp16 is
    fp16, though it adds up in fp32. Backward does not count, with what it computes again.

    While it is entered, compiled models and torch's fused transformer layers run operation by
    operation.

    Attributes:
        softmax_in: names of the modules that themselves ran a softmax or a fused attention.
        fused_attention_in: of those, the modules that ran a fused attention.
        mixed_products_in: names of the modules that multiplied different types, which real tensors
            refuse and fake ones do not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.softmax_in: set[str] = set()
        self.fused_attention_in: set[str] = set()
        self.mixed_products_in: set[str] = set()
        self._names = {module: name for name, module in model.named_modules()}
        self._types: dict[str, set[str]] = {}
        self._operands: dict[str, set[str]] = {}
        self._inputs: dict[str, set[str]] = {}
        self._outputs: dict[str, set[str]] = {}
        self._running: list[str] = []
        self._hooks: list[RemovableHandle] = []

    @property
    def computed(self) -> dict[str, str]:
        """Module name -> type of its own operations: `fp16`, or `fp16+fp32` when they differ.

        The empty name is the model itself, `loss` what ran outside its forward. Modules that
        computed nothing themselves are not in it.
        """
        names = dict.fromkeys((*self._names.values(), LOSS))
        return {name: "+".join(sorted(self._types[name])) for name in names if name in self._types}

    def module_types(self, name: str) -> dict[str, str]:
        """What a module computed, multiplied, got and gave: fields of `ModuleTypes`."""
        seen = {
            "computed": self._types,
            "operands": self._operands,
            "inputs": self._inputs,
            "outputs": self._outputs,
        }
        return {
            field: "+".join(sorted(types.get(name, ()))) or "-" for field, types in seen.items()
        }

    def __enter__(self) -> Self:
        for module in self._names:
            # Around the other hooks of a module: what they compute belongs to it.
            self._hooks += [
                module.register_forward_pre_hook(
                    self._enter_module, prepend=True, with_kwargs=True
                ),
                module.register_forward_hook(self._leave_module, always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _enter_module(self, module: nn.Module, inputs: object, named: object) -> None:
        self._running.append(self._names[module])
        _add_types(self._inputs, self._names[module], (inputs, named))

    def _leave_module(self, module: nn.Module, inputs: object, output: object) -> None:
        self._running.pop()
        _add_types(self._outputs, self._names[module], output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = func.overloadpacket.__name__
        running = self._running[-1] if self._running else LOSS
        in_backward = torch._C._current_graph_task_id() != -1
        if operation in PRODUCTS and len({tensor.dtype for tensor in _floating(args)}) > 1:
            self.mixed_products_in.add(running)
        if (operation in PRODUCTS or "attention" in operation) and not in_backward:
            _add_types(self._operands, running, args)
        result = func(*args, **kwargs)
        moves = func.is_view or operation in MOVES or func.namespace in COMMUNICATION
        if in_backward or moves or not _floating((args, kwargs)):
            return result
        if outputs := _floating(result):
            # The first is the result; others are statistics, which kernels keep in fp32.
            self._note(operation, outputs[0].dtype)
        return result

    def _note(self, operation: str, dtype: torch.dtype) -> None:
        name = self._running[-1] if self._running else LOSS
        self._types.setdefault(name, set()).add(dtype_name(dtype))
        if self._running and ("softmax" in operation or "attention" in operation):
            self.softmax_in.add(name)
        if self._running and "attention" in operation:
            self.fused_attention_in.add(name)


def _floating(values: Any) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point]


def _add_types(types: dict[str, set[str]], name: str, values: Any) -> None:
    found = {dtype_name(tensor.dtype) for tensor in _floating(values)}
    types.setdefault(name, set()).update(found)


def types_of(tensors: Iterable[Tensor]) -> str:
    """Their types, joined by `+`; `-` without tensors."""
    return "+".join(sorted({dtype_name(tensor.dtype) for tensor in tensors})) or "-"


def observed_types(model: nn.Module, observer: TypesObserver) -> dict[str, ModuleTypes]:
    """Types of every module after the first forward and backward, and of the loss."""
    modules = {
        name: ModuleTypes(
            stored=types_of(module.parameters(recurse=False)),
            **observer.module_types(name),
            gradient=types_of(
                p.grad for p in module.parameters(recurse=False) if p.grad is not None
            ),
        )
        for name, module in model.named_modules()
    }
    loss = ModuleTypes(stored="-", gradient="-", **observer.module_types(LOSS))
    return {**modules, LOSS: loss}
