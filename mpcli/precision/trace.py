"""Which module makes the first NaN or infinity out of finite numbers, forward or backward."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mpcli.precision.observe import LOSS
from mpcli.records import NonFiniteOrigin

KEPT_ELEMENTS = 2**18
"""Of each tensor that is kept, at most; evenly spaced over it."""


@dataclasses.dataclass
class Kept:
    """What one call of a module gave and got: fp32 tensors on the CPU, one-dimensional.

    Attributes:
        inputs: floating-point tensors that it was called with.
        outputs: floating-point tensors that it returned, as they were then.
        gradients: of the loss, times what it was scaled by, by the numbers of the outputs that
            have one.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    gradients: dict[int, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Fault:
    """Non-finite values and where they were made; eaten: a module made finite ones of them."""

    origin: NonFiniteOrigin
    eaten: bool = False


@dataclasses.dataclass(eq=False)
class _Frame:
    """A running module, or what runs outside the model. `fault` is one that it can see."""

    name: str
    call: int = 0
    fault: _Fault | None = None
    entered: _Fault | None = None  # with its inputs


class ModuleTrace:
    """Finds the module that made the first non-finite value of a forward and backward.

    ```
    with ModuleTrace(model) as trace:
        loss = loss_function(model, batch)
        trace.watch(loss)
        loss.backward()
    trace.origin
    ```
    It follows non-finite values the way that they take, so `origin` is of those that reached the
    loss, or a gradient of a leaf; others (the -inf of a mask, that a softmax made 0) are nobody's
    fault. Forward: the innermost running module made what its callees were given finite, or not at
    all. Backward: every node of the graph belongs to the module that ran when it was made, and a
    node with finite `grad_outputs` and a non-finite `grad_input` is where it began. Infinities of
    one sign, -inf, in tensors without gradient are taken for masks.

    Reads each tensor on the host, and adds hooks until it is left: not for a training's every step.
    What a module computes again in backward (activation checkpointing) does not count.

    Args:
        keep: also keep what the modules gave and got, in `kept`.

    Attributes:
        kept: by name and call of the module, in the order in which they returned.
    """

    def __init__(self, model: nn.Module, *, keep: bool = False) -> None:
        self.kept: dict[tuple[str, int], Kept] = {}
        self._keep = keep
        self._names = {module: name for name, module in model.named_modules()}
        self._outside = _Frame(LOSS)
        self._running = [self._outside]
        self._calls: Counter[str] = Counter()
        self._frames: dict[Node, _Frame] = {}
        self._loss: _Fault | None = None
        self._consumers: dict[Node, list[tuple[Node, int]]] = {}
        self._sent: dict[tuple[Node, int], _Fault] = {}  # by node and number of its grad_input
        self._arrived: list[_Fault] = []  # at leaves, in the order of backward
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for module in self._names:
            # Around the other hooks of a module: what they compute belongs to it.
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._origin = self._found()
        for graph in (self._frames, self._consumers, self._sent):
            graph.clear()  # they would keep the activations

    @property
    def origin(self) -> NonFiniteOrigin | None:
        """Of the loss that was watched, else of the gradients; without a loss, of the outputs.

        None where they are finite. To be read after the trace was left.
        """
        return self._origin

    def watch(self, loss: Tensor) -> None:
        """Follow the backward of a loss, which is to come; once in a trace.

        Args:
            loss: any shape.
        """
        self._loss = self._seen(self._outside, [loss])
        if loss.grad_fn is None:
            return
        self._attribute([loss], self._outside)
        for node in _graph([loss.grad_fn]):
            for number, (source, _) in enumerate(node.next_functions):
                if source is not None:
                    self._consumers.setdefault(source, []).append((node, number))
            self._handles.append(node.register_hook(self._watcher(node)))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if _in_backward():
            return
        name, caller = self._names[module], self._running[-1]
        inputs = _tensors((args, kwargs))
        frame = _Frame(name, self._calls[name])
        self._calls[name] += 1
        self._attribute(inputs, caller)
        given = _first_defect(inputs)
        if given and caller is self._outside and not any(_defect(t) and t.grad_fn for t in inputs):
            frame.fault = caller.fault = _fault(frame, "input", given)
        elif given:
            frame.fault = self._seen(caller, inputs)
        frame.entered = frame.fault
        self._running.append(frame)
        if self._keep:
            self.kept[name, frame.call] = Kept([_kept(t) for t in inputs], [])

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _in_backward():
            return
        frame, caller = self._running.pop(), self._running[-1]
        outputs = _tensors(output)
        self._attribute(outputs, frame)
        found = self._seen(frame, outputs)
        if found and (caller.fault is None or caller.fault.eaten):
            caller.fault = found
        if frame.entered and not found:
            frame.entered.eaten = True
        if self._keep:
            self._keep_outputs(frame, outputs)

    def _seen(self, frame: _Frame, tensors: list[Tensor]) -> _Fault | None:
        """The fault that is to blame for what a frame shows, if that is not finite."""
        for tensor in tensors:
            if value := _defect(tensor):
                if frame.fault is None:
                    operation = tensor.grad_fn.name() if tensor.grad_fn else None
                    frame.fault = _fault(frame, "forward", value, operation)
                return frame.fault
        return None

    def _keep_outputs(self, frame: _Frame, outputs: list[Tensor]) -> None:
        kept = self.kept.pop((frame.name, frame.call))
        self.kept[frame.name, frame.call] = kept  # now in the order of returning
        for number, tensor in enumerate(outputs):
            kept.outputs.append(_kept(tensor))
            if tensor.requires_grad:
                keep = _keeper(kept.gradients, number)
                self._handles.append(tensor.register_hook(keep))

    def _attribute(self, tensors: list[Tensor], frame: _Frame) -> None:
        """Nodes behind these tensors that belong to nobody yet were made in this frame."""
        made_by = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        for node in _graph(made_by, self._frames):
            self._frames[node] = frame

    def _watcher(self, node: Node) -> Callable[[Any, Any], None]:
        def watch(gradients: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
            fault = self._received(node, given)
            if fault and not node.next_functions:
                self._arrived.append(fault)
            for number, gradient in enumerate(gradients):
                if gradient is not None and (value := _defect(gradient, masks=False)):
                    fault = fault or self._made(node, value)
                    self._sent[node, number] = fault

        return watch

    def _received(self, node: Node, given: tuple[Tensor | None, ...]) -> _Fault | None:
        """The fault behind non-finite gradients that came to a node."""
        value = _first_defect([tensor for tensor in given if tensor is not None], masks=False)
        if value is None:
            return None
        consumers = self._consumers.get(node, [])
        if sent := [self._sent[edge] for edge in consumers if edge in self._sent]:
            return sent[0]
        # Finite gradients of several uses were added up to something that is not.
        names = [self._frames[consumer].name for consumer, _ in consumers]
        return _fault(_Frame(_common(names)), "backward", value, "sum of gradients")

    def _made(self, node: Node, value: Literal["nan", "inf"]) -> _Fault:
        frame = self._frames[node]
        seen = frame.fault
        if seen and not seen.eaten and seen.origin.module != frame.name:
            return seen  # its forward had non-finite values already, which the loss does not show
        return _fault(frame, "backward", value, node.name())

    def _found(self) -> NonFiniteOrigin | None:
        if self._loss:
            return self._loss.origin
        if not self._consumers:
            return self._outside.fault.origin if self._outside.fault else None
        return self._arrived[0].origin if self._arrived else None


def _fault(
    frame: _Frame,
    phase: Literal["forward", "backward", "input"],
    value: Literal["nan", "inf"],
    operation: str | None = None,
) -> _Fault:
    return _Fault(
        NonFiniteOrigin(
            module=frame.name, call=frame.call, phase=phase, value=value, operation=operation
        )
    )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(values: Any) -> list[Tensor]:
    """The floating-point tensors in arguments or results, those of dataclasses too."""
    found: list[Tensor] = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif dataclasses.is_dataclass(leaf):
            found += _tensors(list(vars(leaf).values()))
    return found


@torch.no_grad()
def _defect(tensor: Tensor, *, masks: bool = True) -> Literal["nan", "inf"] | None:
    """What is not finite in a tensor.

    Args:
        masks: whether -inf in a tensor without gradient counts as finite.
    """
    values = tensor.detach()
    if values.dtype.itemsize == 1:  # fp8 has no such kernels
        values = values.float()
    if values.isfinite().all():
        return None
    if values.isnan().any():
        return "nan"
    if masks and not tensor.requires_grad and not values.isposinf().any():
        return None
    return "inf"


def _first_defect(tensors: list[Tensor], *, masks: bool = True) -> Literal["nan", "inf"] | None:
    for tensor in tensors:
        if value := _defect(tensor, masks=masks):
            return value
    return None


def _graph(roots: list[Node], known: Container[Node] = ()) -> Iterator[Node]:
    """The nodes that lead to the roots, without those known and what leads to them."""
    seen: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in seen and node not in known:
            seen.add(node)
            yield node
            waiting += [source for source, _ in node.next_functions if source is not None]


@torch.no_grad()
def _kept(tensor: Tensor) -> Tensor:
    values = tensor.detach().flatten()
    if values.numel() > KEPT_ELEMENTS:
        places = torch.arange(KEPT_ELEMENTS, device=values.device)
        values = values[places * values.numel() // KEPT_ELEMENTS]
    return values.to("cpu", torch.float32, copy=True)


def _keeper(gradients: dict[int, Tensor], number: int) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        gradients[number] = _kept(gradient)

    return keep


def _common(names: list[str]) -> str:
    """The innermost module that all of these are, or lie in; `loss` if there is none."""
    if not names or LOSS in names:
        return LOSS
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
