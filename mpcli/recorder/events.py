"""What happens in one step of a loop, seen where it happens: in the calls of torch themselves."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.utils.clip_grad  # as a module: its functions find each other in it
from torch import Tensor, nn
from torch.utils._foreach_utils import _has_foreach_support

from mpcli.precision.formats import dtype_name
from mpcli.precision.observe import types_of
from mpcli.recorder.patches import defining_class, function_of, in_backward, replaced
from mpcli.recorder.tensors import floating_tensors, gradient_norm
from mpcli.records import LoopEvent

MAX_EVENTS = 200
"""Of one step that are kept; more micro-batches than that tell nothing new."""

GradientState = Literal["none", "scaled", "unscaled", "mixed"]


class StepEvents:
    """The events of one step, in order, and what the gradients are.

    Numbers stay on the device until `read`. Nothing here changes a tensor of the loop.

    Args:
        parameters: of the model and of the optimizer; their `.grad` is what is watched.
        stepped: those that the optimizer steps; norms are of their gradients.
        scaler: a `torch.amp.GradScaler`, or None.
        watch_modules: whether hooks of the model can be used; a compiled one would be compiled
            again.

    Attributes:
        before_backward, before_change, before_update: called before every backward; before
            something reads or writes finished gradients (unscaling, clipping, the optimizer);
            before the weights may change.
        gradients: what they are now.
        stepped_optimizer: whether the optimizer's step ran; `fused_skip` whether it decides inside
            that a step with gradients that are not finite is left out.
        autocast: what forwards ran in: `fp16`, `bf16`, `off`.
        backward_alone: gradients are what backward added up: nobody else wrote to them yet, and
            no other process had a part in them.
        paused: nothing is noted: what runs is not the loop's.
        losses: of every backward, without the scale; after `read`.
        norm: of the gradients, before clipping and without the scale; after `read`.
        scale: of the loss; 1 without a scaler; after `read`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        parameters: Sequence[Tensor],
        stepped: Sequence[Tensor],
        *,
        watch_modules: bool,
    ) -> None:
        self.events: list[LoopEvent] = []
        self.left_out = 0
        self.gradients: GradientState = "none"
        self.has_gradients = False  # of this step
        self.stepped_optimizer = False
        self.fused_skip = False
        self.backward_alone = not (dist.is_available() and dist.is_initialized())
        self.paused = False
        self.autocast: set[str] = set()
        self.losses: list[float] = []
        self.norm = 0.0
        self.scale = 1.0
        self.before_backward: Callable[[list[Tensor]], None] = _nothing
        self.before_change: Callable[[], None] = _nothing
        self.before_update: Callable[[], None] = _nothing
        self._model, self._optimizer = model, optimizer
        self._scaler: Any = scaler if scaler is not None and scaler.is_enabled() else None
        self._parameters, self._stepped = parameters, stepped
        self._watch_modules = watch_modules
        self._forward_autocast: set[str] = set()
        self._scaled: list[tuple[Tensor, Tensor]] = []  # outputs of `scaler.scale`, and its inputs
        self._scale_was_called = False
        self._in_scaler_step = False
        self._versions = self._gradient_versions()
        self._numbers: list[tuple[int, str, Tensor]] = []  # of an event, on the device
        self._losses: list[Tensor] = []
        self._norm: tuple[Tensor, bool] | None = None  # and whether it is scaled

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what the loop does in the block; outside of it nothing is left replaced."""
        clip_grad = torch.nn.utils.clip_grad
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(torch.autograd, "backward", self._backward))
            # Every form of clipping calls it, also a function that was imported by name.
            grouping = "_group_tensors_by_device_and_dtype"
            if hasattr(clip_grad, grouping):
                stack.enter_context(replaced(clip_grad, grouping, self._group))
            for owner in (self._optimizer, self._model):
                kind = defining_class(owner, "zero_grad")
                stack.enter_context(replaced(kind, "zero_grad", self._zero_grad, owner))
            if self._scaler is not None:
                for name, around in (
                    ("scale", self._scale),
                    ("unscale_", self._unscale),
                    ("step", self._scaler_step),
                    ("update", self._scaler_update),
                ):
                    stack.enter_context(replaced(self._scaler, name, around))
            # Hooks: schedulers and accelerate replace the step of an optimizer themselves.
            handles = [
                self._optimizer.register_step_pre_hook(self._before_optimizer),
                self._optimizer.register_step_post_hook(self._after_optimizer),
            ]
            if self._watch_modules:
                see, after = function_of(self._see_autocast), function_of(self._after_forward)
                first = _called_first(self._model)
                handles += [m.register_forward_pre_hook(see, prepend=True) for m in first]
                handles.append(self._model.register_forward_hook(after))
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def add(self, event: LoopEvent, **numbers: Tensor | None) -> None:
        """Note an event, and numbers of it that are still on the device."""
        if len(self.events) == MAX_EVENTS:
            self.left_out += 1
            return
        found = [(name, number) for name, number in numbers.items() if number is not None]
        self._numbers += [(len(self.events), name, number) for name, number in found]
        self.events.append(event)

    def measure(self) -> None:
        """Take the norm of the gradients, if no clipping did."""
        if self._norm is None:
            self._norm = (gradient_norm(self._stepped_gradients()), self.gradients == "scaled")

    def read(self) -> None:
        """Copy all numbers to the host, in one piece."""
        tensors = [number for _, _, number in self._numbers] + self._losses
        if self._norm:
            tensors.append(self._norm[0])
        scale = self._scaler._get_scale_async() if self._scaler is not None else None
        if not tensors:
            return
        device = self._parameters[0].device
        flat = [number.detach().to(device).double().reshape(()) for number in tensors]
        one = torch.ones((), dtype=torch.float64, device=device)
        flat.append(one if scale is None else scale.detach().to(device).double())
        *values, self.scale = torch.stack(flat).tolist()
        if self._norm:
            self.norm = values.pop() / (self.scale if self._norm[1] else 1.0)
        for (number, name, _), value in zip(self._numbers, values, strict=False):
            self.events[number] = self.events[number].model_copy(update={name: value})
        self.losses += values[len(self._numbers) :]
        self._numbers, self._losses, self._norm = [], [], None

    def _see_autocast(self, module: nn.Module, args: Any) -> None:
        if not self.paused and not in_backward():
            self._forward_autocast.add(_autocast_type(self._parameters[0].device.type))

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.paused or not torch.is_grad_enabled() or in_backward():
            return
        autocast = "+".join(sorted(self._forward_autocast)) or None
        self.autocast |= self._forward_autocast
        self._forward_autocast = set()
        types = types_of(floating_tensors(output))
        self.add(LoopEvent(event="forward", autocast=autocast, output=types))

    def _scale(self, original: Any, outputs: Any) -> Any:
        scaled = original(outputs)
        self._scale_was_called = True
        if isinstance(outputs, Tensor):
            self._scaled.append((scaled, outputs.detach()))
        self.add(LoopEvent(event="scale"), scale=self._scaler._get_scale_async())
        return scaled

    def _backward(
        self, original: Any, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self.paused:
            return original(tensors, grad_tensors, *args, **kwargs)
        self._notice_changes()
        if not self.has_gradients:
            self._notice_stale()
        tensors = tensors if isinstance(tensors, Tensor) else list(tensors)
        if grad_tensors is not None and not isinstance(grad_tensors, Tensor):
            grad_tensors = list(grad_tensors)
        roots = [tensors] if isinstance(tensors, Tensor) else tensors
        seeds = grad_tensors if isinstance(grad_tensors, list) else [grad_tensors] * len(roots)
        self.before_backward([root for root in roots if isinstance(root, Tensor)])
        loss = self._loss(roots, seeds)
        self._losses.append(loss)
        before = self.gradients
        self.add(LoopEvent(event="backward", gradients=before), loss=loss)
        result = original(tensors, grad_tensors, *args, **kwargs)
        now: GradientState = "scaled" if self._scale_was_called else "unscaled"
        self.gradients = now if before in ("none", now) else "mixed"
        self.has_gradients = True
        self._scale_was_called = False
        self._scaled.clear()
        self._versions = self._gradient_versions()
        return result

    def _loss(self, roots: list[Any], seeds: list[Tensor | None]) -> Tensor:
        """The number whose gradient a backward computes, without the scale."""
        total = torch.zeros((), device=self._parameters[0].device)
        for root, seed in zip(roots, seeds, strict=True):
            if not isinstance(root, Tensor):  # an edge of the graph has no value
                continue
            value = next((plain for scaled, plain in self._scaled if scaled is root), None)
            if value is None:
                value = root.detach().float()
                if self._scale_was_called:  # and the loop went on to work with what it returned
                    value = value / self._scaler._get_scale_async().to(value.device)
            value = value.float() if seed is None else value.float() * seed.detach().float()
            total = total + value.sum().to(total.device)
        return total

    def _notice_stale(self) -> None:
        if any(parameter.grad is not None for parameter in self._parameters):
            stale = [p.grad for p in self._parameters if p.grad is not None]
            self.add(LoopEvent(event="stale_gradients"), norm=gradient_norm(stale))

    def _zero_grad(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._notice_changes()
        result = original(*args, **kwargs)
        self.add(LoopEvent(event="zero_grad", gradients=self.gradients))
        self.backward_alone = self.backward_alone and not self.has_gradients
        self.gradients = "none"
        self._versions = self._gradient_versions()
        return result

    def _gradient_versions(self) -> dict[int, tuple[int, int]]:
        return {
            number: (id(parameter.grad), parameter.grad._version)
            for number, parameter in enumerate(self._parameters)
            if parameter.grad is not None
        }

    def _notice_changes(self) -> None:
        """Note that something else wrote to gradients since the last event."""
        versions = self._gradient_versions()
        if versions == self._versions:
            return
        if self._versions and not versions:
            self.add(LoopEvent(event="zero_grad", gradients=self.gradients))
            self.gradients = "none"
        else:
            self.add(LoopEvent(event="gradients_changed", gradients=self.gradients))
            self.has_gradients, self.backward_alone = True, False
        self._versions = versions

    @contextlib.contextmanager
    def _using_gradients(self) -> Iterator[None]:
        self._notice_changes()
        if self.has_gradients:
            self.before_change()
        yield
        self._versions = self._gradient_versions()

    def _unscale(self, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if optimizer is not self._optimizer:
            return original(optimizer, *args, **kwargs)
        with self._using_gradients():
            by = "scaler.step" if self._in_scaler_step else None
            self.add(LoopEvent(event="unscale", gradients=self.gradients, by=by))
            result = original(optimizer, *args, **kwargs)
        self.gradients = "unscaled" if self.gradients == "scaled" else self.gradients
        return result

    def _group(self, original: Any, tensors: list[list[Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Called by torch's clipping functions with the gradients, before they change them."""
        caller = sys._getframe(2)
        event = _CLIPPING.get(caller.f_code.co_name)
        clipped = {id(gradient) for gradient in tensors[0]}
        if event is None or clipped.isdisjoint(id(p.grad) for p in self._parameters):
            return original(tensors, *args, **kwargs)
        self._notice_changes()
        if self.has_gradients:
            self.before_change()
        norm = gradient_norm(self._stepped_gradients())
        self._norm = self._norm or (norm, self.gradients == "scaled")
        limit = caller.f_locals["max_norm" if event == "clip_norm" else "clip_value"]
        self.add(LoopEvent(event=event, gradients=self.gradients, limit=limit), norm=norm)
        writes = 2 if event == "clip_value" and _in_groups(caller.f_locals, tensors[0]) else 1
        self._versions = {
            number: (gradient, version + (writes if gradient in clipped else 0))
            for number, (gradient, version) in self._versions.items()
        }
        return original(tensors, *args, **kwargs)

    def _scaler_step(self, original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if optimizer is not self._optimizer:
            return original(optimizer, *args, **kwargs)
        with self._using_gradients():
            self.before_update()
            self._in_scaler_step, self.stepped_optimizer = True, False
            try:
                result = original(optimizer, *args, **kwargs)
            finally:
                self._in_scaler_step = False
            if not self.stepped_optimizer:
                self.add(LoopEvent(event="skipped_step", gradients=self.gradients))
        return result

    def _scaler_update(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.add(LoopEvent(event="scaler_update"))
        return result

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        by = "scaler.step" if self._in_scaler_step else None
        if by is None:
            self._notice_changes()
            if self.has_gradients:
                self.before_change()
                self.before_update()
        # A fused optimizer unscales inside, and leaves the weights as they are inside.
        unscales = getattr(optimizer, "grad_scale", None) is not None
        self.fused_skip = getattr(optimizer, "found_inf", None) is not None
        gradients = "unscaled" if unscales and self.gradients == "scaled" else self.gradients
        self.add(LoopEvent(event="optimizer_step", gradients=gradients, by=by))

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.stepped_optimizer = True
        self._versions = self._gradient_versions()

    def _stepped_gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._stepped if parameter.grad is not None]


_CLIPPING: dict[str, Literal["clip_norm", "clip_value"]] = {
    "_clip_grads_with_norm_": "clip_norm",
    "clip_grad_value_": "clip_value",
}
"""Functions of torch that clip gradients in place."""


def _in_groups(arguments: Mapping[str, Any], gradients: list[Tensor]) -> bool:
    """Whether a clipping function works on groups of tensors: by value, it then writes twice."""
    foreach = arguments["foreach"]
    return _has_foreach_support(gradients, gradients[0].device) if foreach is None else foreach


def _nothing(*_: object) -> None:
    pass


def _called_first(model: nn.Module) -> list[nn.Module]:
    """Modules that run inside of the model's forward: its children, but not containers of them.

    The model's own hooks run outside of a forward that somebody wrapped in autocast.
    """
    found: list[nn.Module] = []
    for child in model.children():
        found += (
            _called_first(child) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
        )
    return found or [model]


def _autocast_type(device_type: str) -> str:
    if not torch.is_autocast_enabled(device_type):
        return "off"
    return dtype_name(torch.get_autocast_dtype(device_type))
