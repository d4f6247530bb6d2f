"""Which module made a step's first NaN or infinity: its forward is repeated, on a copy."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from mpcli.precision.observe import LOSS
from mpcli.precision.trace import ModuleTrace, defect
from mpcli.recorder.patches import Failures, in_backward
from mpcli.recorder.random_state import RandomState, untouched_random_state
from mpcli.recorder.tensors import all_finite, floating_tensors, is_ordinary
from mpcli.records import NonFiniteOrigin


@dataclass
class ForwardCall:
    """What a forward of the model began with, and the gradients that its outputs got later.

    `gradients` are by the numbers of the outputs among `floating_tensors`, of the last backward
    that reached them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    autocast: dict[str, tuple[bool, torch.dtype]]
    random: RandomState
    gradients: dict[int, Tensor] = field(default_factory=dict)


class ForwardCalls:
    """References to what the forwards of one step began with: nothing is copied.

    Attributes:
        calls: in their order; those without gradients are left out.
    """

    def __init__(self, model: nn.Module, device: torch.device, failures: Failures) -> None:
        self.calls: list[ForwardCall] = []
        self._failures = failures
        self._model, self._device = model, device
        self._running: list[ForwardCall] = []
        self._handles: list[RemovableHandle] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note forwards in the block."""
        self._handles = [
            self._model.register_forward_pre_hook(
                self._failures.safe(self._before), prepend=True, with_kwargs=True
            ),
            self._model.register_forward_hook(self._failures.safe(self._after)),
        ]
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = []
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and not in_backward() and all(map(is_ordinary, inputs)):
            types = {"cpu", self._device.type}
            autocast = {
                kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in types
            }
            self._running = [
                ForwardCall(args, kwargs, self._device, autocast, RandomState.now(self._device))
            ]

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if not self._running or in_backward():
            return
        call = self._running.pop()
        self.calls.append(call)
        for number, tensor in enumerate(floating_tensors(output)):
            if tensor.grad_fn is not None:  # the gradient of a leaf is not of this output alone
                self._handles.append(tensor.register_hook(_keeper(call, number)))


def find_origin(
    model: nn.Module, calls: Sequence[ForwardCall], losses: Sequence[float]
) -> tuple[NonFiniteOrigin | None, str | None]:
    """Repeat a step's forwards, and backwards, on a copy of the model until one is not finite.

    The model, its gradients, and the states of random numbers (torch, `random`, `numpy.random`)
    stay as they are. Buffers are those after the step's forwards; hooks that somebody put on
    modules are not repeated. What a forward itself does outside of the model, such as counting its
    calls in a global, is done once more.

    Args:
        losses: of the step's backwards.

    Returns:
        The origin, or None and why it was not found.
    """
    if not calls:
        return None, "no forward of the model with gradients was seen"
    try:
        twin = _copied(model)
        for call in calls:
            if origin := _repeat(twin, call, all(map(math.isfinite, losses))):
                return origin, None
    except Exception as error:  # no memory for a copy, a model that cannot be copied or repeated
        reason = str(error).partition("\n")[0]
        return None, f"the forward could not be repeated: {type(error).__name__}: {reason}"
    if any(_hooks(module) for module in model.modules()):
        return None, "all was finite when it was repeated, without the hooks of others on modules"
    for loss in losses:
        if not math.isfinite(loss):
            value: Literal["nan", "inf"] = "nan" if math.isnan(loss) else "inf"
            return NonFiniteOrigin(module=LOSS, phase="forward", value=value), None
    return None, "all was finite when it was repeated"


def nonfinite_weights(model: nn.Module) -> NonFiniteOrigin | None:
    """The first module whose own weights are not finite; `operation` is `weights` then.

    Reads each parameter on the host. -inf in one that is not trained is taken for a mask.
    """
    for name, parameter in model.named_parameters():
        if value := defect(parameter):
            module = name.rpartition(".")[0]
            return NonFiniteOrigin(module=module, phase="forward", value=value, operation="weights")
    return None


def _repeat(twin: nn.Module, call: ForwardCall, is_loss_finite: bool) -> NonFiniteOrigin | None:
    with _as_it_was(call), ModuleTrace(twin) as trace:
        outputs = floating_tensors(twin(*_own(call.args), **_own(call.kwargs)))
        if is_loss_finite and call.gradients:  # else what a mask made infinite is not the matter
            reached = [outputs[number] for number in call.gradients]
            end = _Gradients.apply(list(call.gradients.values()), *reached)
            trace.watch(end)
            end.backward()
        elif all_finite([tensor for tensor in outputs if tensor.requires_grad]):
            return None
    return trace.origin


class _Gradients(torch.autograd.Function):
    """0, whose backward gives the outputs the gradients that they got in the loop."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


@contextlib.contextmanager
def _as_it_was(call: ForwardCall) -> Iterator[None]:
    """The random numbers and the autocast of a call, for the block."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched_random_state(call.device))
        stack.enter_context(torch.enable_grad())
        for kind, (enabled, dtype) in call.autocast.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        call.random.restore(call.device)
        yield


def _own(values: Any) -> Any:
    """Copies outside of the loop's graph: a forward may write to what it is given."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return tree_map(copied, values)


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy without hooks; what its modules remember of a graph is copied without that.

    A hook may write to what lies outside of the model. Only those of `torch.nn.utils` stay, such as
    `weight_norm`, without which a module has no weight.

    Raises:
        TypeError: a module's forward is a function that holds on to the model itself.
    """
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FunctionType) and forward.__closure__:
            raise TypeError(f"the forward of {name or 'the model'} was replaced by a closure")
        for kind in _HOOKS:
            hooks = getattr(module, kind)
            kept = {number: hook for number, hook in hooks.items() if _is_torch_s(hook)}
            memo[id(hooks)] = OrderedDict(copy.deepcopy(kept, memo))
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    twin = copy.deepcopy(model, memo)
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooks(module: nn.Module) -> list[object]:
    """Those that are not repeated."""
    return [
        hook for kind in _HOOKS for hook in getattr(module, kind).values() if not _is_torch_s(hook)
    ]


def _is_torch_s(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


def _keeper(call: ForwardCall, number: int) -> Any:
    def keep(gradient: Tensor) -> None:
        call.gradients[number] = gradient

    return keep
