"""Which module makes the first NaN or infinity out of finite numbers, forward or backward."""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mpcli.precision.observe import LOSS
from mpcli.precision.operations import Listener
from mpcli.records import NonFiniteOrigin

CONSTANTS = frozenset((
    *("masked_fill", "masked_fill_", "where", "fill_", "full", "full_like", "new_full"),
    *("scalar_tensor", "lift_fresh"),
))  # fmt: skip
"""Operations that write what they are told: the -inf of a mask is meant, NaN made of it is not."""
WEIGHTS = "weights"
"""The operation of a fault that no operation made: a module's own parameters are not finite."""
KEPT_ELEMENTS = 2**18
"""Of each tensor that is kept, at most; evenly spaced over it."""


_Phase = Literal["forward", "backward", "input"]


@dataclasses.dataclass
class Kept:
    """What one call of a module gave and got: fp32 tensors on the CPU, one-dimensional.

    Attributes:
        inputs: floating-point tensors that it was called with.
        outputs: floating-point tensors that it returned, as they were then.
        gradients: of the loss, times what it was scaled by, by the numbers of the outputs that
            have one.
        input_gradients: the same by the numbers of the inputs; of a tensor that others use too,
            their share is in it.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    gradients: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    input_gradients: dict[int, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Fault:
    """Where non-finite values were made, in the order in which that was seen.

    `is_mask`: -inf and nothing else was written there, as masks are made.
    """

    origin: NonFiniteOrigin
    number: int
    is_mask: bool


@dataclasses.dataclass(eq=False)
class _Frame:
    """A running module, or what runs outside the model."""

    name: str
    call: int = 0


class _Flow(TorchDispatchMode):
    """Follows non-finite values from operation to operation, forward: where each came from.

    What an operation makes of non-finite inputs has their origin; what it makes of finite ones has
    its own. A value that ends (the -inf of a mask, of which a softmax makes 0) is forgotten with
    its tensor.

    Args:
        running: the frame whose operations these are.
        owners: names of modules by the id of their parameters.
        listen: to be told of each operation.
    """

    def __init__(
        self,
        running: Callable[[], _Frame],
        owners: Mapping[int, str],
        listen: Listener | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._listen = listen
        self._running = running
        self._owners = owners
        self._faults: dict[int, tuple[StorageWeakRef, _Fault]] = {}  # by memory
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _in_backward():
            inputs = _tensors((args, kwargs))
            for output in _tensors(result):
                self._follow(func.overloadpacket.__name__, inputs, output)
            if self._listen:
                frame = self._running()
                names = (argument.name for argument in func._schema.arguments)
                given = dict(zip(names, args, strict=False)) | kwargs
                self._listen((frame.name, frame.call), func, given, result)
        return result

    def add(self, tensor: Tensor, frame: _Frame, phase: _Phase, operation: str | None) -> _Fault:
        """Note where the non-finite values of a tensor come from."""
        origin = NonFiniteOrigin(
            module=frame.name,
            call=frame.call,
            phase=phase,
            value=defect(tensor) or "inf",
            operation=operation,
            elements=tensor.numel(),
        )
        is_mask = operation in CONSTANTS and origin.value == "inf" and not tensor.isposinf().any()
        self._count += 1
        fault = _Fault(origin, self._count, bool(is_mask))
        storage = tensor.untyped_storage()
        self._faults[storage._cdata] = StorageWeakRef(storage), fault
        return fault

    def of(self, tensor: Tensor) -> _Fault | None:
        """What was noted of a tensor, or of another one in its memory, that is not finite."""
        if not defect(tensor):
            return None
        reference, fault = self._faults.get(tensor.untyped_storage()._cdata, (None, None))
        return fault if reference is not None and not reference.expired() else None

    def first_of(self, tensors: list[Tensor]) -> _Fault | None:
        """The fault behind several tensors: the first that is no mask."""
        faults = filter(None, map(self.of, tensors))
        return min(faults, key=lambda fault: (fault.is_mask, fault.number), default=None)

    def _follow(self, operation: str, inputs: list[Tensor], output: Tensor) -> None:
        memory = output.untyped_storage()
        if defect(output) is None:
            if output.nbytes == memory.nbytes():
                self._faults.pop(memory._cdata, None)
            return
        given = [tensor for tensor in inputs if tensor is not output and defect(tensor)]
        for tensor in given:
            if self.of(tensor):
                continue
            if (owner := self._owners.get(id(tensor))) is not None:
                self.add(tensor, _Frame(owner), "forward", WEIGHTS)
            elif self._running().name == LOSS:  # what is used outside the model is the batch
                self.add(tensor, _Frame(""), "input", None)
        known = self.first_of([*given, output])
        if known is None or (known.is_mask and defect(output) == "nan"):
            self.add(output, self._running(), "forward", operation)
        else:
            self._faults[memory._cdata] = StorageWeakRef(memory), known


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
    fault. Forward: the operation that made non-finite values out of finite ones, and the module
    that was running (`input`: they came with the batch; operation `weights`: a module's own
    parameters are not finite). Backward: a node of the graph with finite `grad_outputs` and a
    non-finite `grad_input`, and the module that was running when the node was made.

    Reads each tensor on the host, and adds hooks until it is left: not for a training's every step.
    What a module computes again in backward (activation checkpointing) does not count; of a block
    that is checkpointed reentrantly, backward is one node of its caller's.

    Args:
        keep: also keep what the modules gave and got, in `kept`.
        listen: to be told of each operation of the forward.

    Attributes:
        kept: by name and call of the module, in the order in which they returned.
    """

    def __init__(
        self, model: nn.Module, *, keep: bool = False, listen: Listener | None = None
    ) -> None:
        self.kept: dict[tuple[str, int], Kept] = {}
        self._keep = keep
        self._names = {module: name for name, module in model.named_modules()}
        self._outside = _Frame(LOSS)
        self._running = [self._outside]
        self._calls: Counter[str] = Counter()
        self._frames: list[tuple[int, _Frame]] = []  # from which node on each was running
        owners = {
            id(parameter): name
            for module, name in self._names.items()
            for parameter in module.parameters(recurse=False)
        }
        self._flow = _Flow(lambda: self._running[-1], owners, listen)
        self._consumers: dict[Node, list[tuple[Node, int]]] = {}
        self._sent: dict[tuple[Node, int], NonFiniteOrigin] = {}  # by number of the grad_input
        self._handles: list[RemovableHandle] = []
        self._origin: NonFiniteOrigin | None = None

    def __enter__(self) -> Self:
        for module in self._names:
            # Around the other hooks of a module: what they compute belongs to it.
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ]
        self._note_running()
        self._flow.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._flow.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        for graph in (self._consumers, self._sent):
            graph.clear()  # they would keep the activations

    @property
    def origin(self) -> NonFiniteOrigin | None:
        """Of the loss that was watched, else of the gradients; without a loss, of the outputs.

        None where they are finite.
        """
        return self._origin

    def watch(self, *losses: Tensor) -> None:
        """Follow the backward that is to come; once in a trace.

        Args:
            losses: what it begins at, of any shape.
        """
        self._origin = self._origin_of(list(losses))
        for node in _graph([loss.grad_fn for loss in losses if loss.grad_fn is not None]):
            for number, (source, _) in enumerate(node.next_functions):
                if source is not None:
                    self._consumers.setdefault(source, []).append((node, number))
            self._handles.append(node.register_hook(self._watcher(node)))

    def _origin_of(self, tensors: list[Tensor]) -> NonFiniteOrigin | None:
        """Where the non-finite values of tensors come from, that are used outside the model."""
        if fault := self._flow.first_of(tensors):
            return fault.origin
        for tensor in tensors:
            if defect(tensor):  # it was not made by an operation
                return self._flow.add(tensor, self._outside, "forward", None).origin
        return None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if _in_backward():
            return
        name = self._names[module]
        frame = _Frame(name, self._calls[name])
        self._calls[name] += 1
        inputs = _tensors((args, kwargs))
        if len(self._running) == 1:
            for tensor in inputs:
                if defect(tensor) and not self._flow.of(tensor):
                    self._flow.add(tensor, frame, "input", None)
        self._running.append(frame)
        self._note_running()
        if self._keep:
            kept = self.kept[name, frame.call] = Kept([kept_values(t) for t in inputs], [])
            self._keep_gradients(inputs, kept.input_gradients)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _in_backward():
            return
        frame, outputs = self._running.pop(), _tensors(output)
        self._note_running()
        if len(self._running) == 1:
            self._origin = self._origin or self._origin_of(outputs)
        if self._keep:
            self._keep_outputs(frame, outputs)

    def _note_running(self) -> None:
        """The nodes that are made from here on belong to the module that is running now."""
        self._frames.append((_get_sequence_nr(), self._running[-1]))

    def _frame_of(self, node: Node) -> _Frame:
        number = bisect.bisect_right(self._frames, node._sequence_nr(), key=lambda mark: mark[0])
        return self._frames[max(number - 1, 0)][1]

    def _keep_outputs(self, frame: _Frame, outputs: list[Tensor]) -> None:
        kept = self.kept.pop((frame.name, frame.call))
        self.kept[frame.name, frame.call] = kept  # now in the order of returning
        kept.outputs += map(kept_values, outputs)
        self._keep_gradients(outputs, kept.gradients)

    def _keep_gradients(self, tensors: list[Tensor], gradients: dict[int, Tensor]) -> None:
        for number, tensor in enumerate(tensors):
            if tensor.requires_grad:
                self._handles.append(tensor.register_hook(_keeper(gradients, number)))

    def _watcher(self, node: Node) -> Callable[[Any, Any], None]:
        def watch(gradients: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
            origin = self._received(node, given)
            if not node.next_functions:  # a leaf
                self._origin = self._origin or origin
            for number, gradient in enumerate(gradients):
                if gradient is not None and (value := defect(gradient)):
                    origin = origin or _backward(self._frame_of(node), value, node.name())
                    self._sent[node, number] = origin

        return watch

    def _received(self, node: Node, given: tuple[Tensor | None, ...]) -> NonFiniteOrigin | None:
        """The origin of non-finite gradients that came to a node."""
        value = first_defect([tensor for tensor in given if tensor is not None])
        if value is None:
            return None
        consumers = self._consumers.get(node, [])
        if sent := [self._sent[edge] for edge in consumers if edge in self._sent]:
            return sent[0]
        # Finite gradients of several uses were added up to something that is not.
        names = [self._frame_of(consumer).name for consumer, _ in consumers]
        return _backward(_Frame(_common(names)), value, "sum of gradients")


def _backward(frame: _Frame, value: Literal["nan", "inf"], operation: str) -> NonFiniteOrigin:
    return NonFiniteOrigin(
        module=frame.name, call=frame.call, phase="backward", value=value, operation=operation
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
            found += _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


@torch.no_grad()
def defect(tensor: Tensor) -> Literal["nan", "inf"] | None:
    """What is not finite in a tensor: NaN before infinity."""
    with _disable_current_modes():
        values = tensor.detach()
        if values.dtype.itemsize == 1:  # fp8 has no such kernels
            values = values.float()
        if values.isfinite().all():
            return None
        return "nan" if values.isnan().any() else "inf"


def first_defect(tensors: list[Tensor]) -> Literal["nan", "inf"] | None:
    """Of the first tensor that has one."""
    return next(filter(None, map(defect, tensors)), None)


def _graph(roots: list[Node]) -> Iterator[Node]:
    """The nodes that lead to the roots, and these."""
    seen: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [source for source, _ in node.next_functions if source is not None]


@torch.no_grad()
def kept_values(tensor: Tensor) -> Tensor:
    """At most `KEPT_ELEMENTS` of a tensor, evenly spaced: one-dimensional, fp32, on the CPU."""
    values = tensor.detach().flatten()
    if values.numel() > KEPT_ELEMENTS:
        places = torch.arange(KEPT_ELEMENTS, device=values.device)
        values = values[places * values.numel() // KEPT_ELEMENTS]
    return values.to("cpu", torch.float32, copy=True)


def _keeper(gradients: dict[int, Tensor], number: int) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        gradients[number] = kept_values(gradient)

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
