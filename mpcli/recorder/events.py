"""What happens in one step of a loop, seen where it happens: in the calls of torch themselves."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.utils.clip_grad  # as a module: its functions find each other in it
from torch import Tensor, nn
from torch.utils._foreach_utils import _has_foreach_support
from torch.utils._pytree import tree_leaves

from mpcli.precision.formats import dtype_name
from mpcli.precision.observe import types_of
from mpcli.recorder.graph import Scaled, reaches
from mpcli.recorder.log import EventLog
from mpcli.recorder.patches import After, Before, Failures, defining_class, in_backward, watched
from mpcli.recorder.tensors import floating_tensors, gradient_norm
from mpcli.records import LoopEvent

MAX_WATCHED_MODULES = 32
"""For autocast, which costs time in every step."""

GradientState = Literal["none", "scaled", "unscaled", "mixed"]


class StepEvents:
    """Watches one step, and what its gradients are; `log` has what happened, in order.

    Args:
        parameters: of the model and of the optimizer; their `.grad` is what is watched.
        stepped: those that the optimizer steps; norms are of their gradients.
        scaler: a `torch.amp.GradScaler`, or None.

    Attributes:
        before_backward, after_backward: called around every backward; the first one with what it
            begins at, and whether that is multiplied by the scale.
        before_change, before_update: called before something reads or writes finished gradients
            (unscaling, clipping, the optimizer); before the weights may change.
        gradients: what they are now.
        has_gradients: whether they are of this step, at least in part.
        backward_alone: gradients are what backward added up: nobody else wrote to them yet, and
            no other process had a part in them.
        stepped_optimizer: whether the optimizer's step ran; `fused_skip` whether it decides inside
            that a step with gradients that are not finite is left out.
        autocast: what forwards ran in: `fp16`, `bf16`, `off`.
        paused: nothing is noted: what runs is not the loop's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        parameters: Sequence[Tensor],
        stepped: Sequence[Tensor],
        failures: Failures,
    ) -> None:
        self._device = parameters[0].device
        self.log = EventLog(self._device)
        self.gradients: GradientState = "none"
        self.has_gradients = False
        self.backward_alone = not (dist.is_available() and dist.is_initialized())
        self.stepped_optimizer = False
        self.fused_skip = False
        self.autocast: set[str] = set()
        self.paused = False
        self.before_backward: Callable[[list[Tensor], bool], None] = _nothing
        self.after_backward: Callable[[], None] = _nothing
        self.before_change: Callable[[], None] = _nothing
        self.before_update: Callable[[], None] = _nothing
        self._model, self._optimizer = model, optimizer
        self._scaler: Any = scaler if scaler is not None and scaler.is_enabled() else None
        self._parameters, self._stepped = parameters, stepped
        self._failures = failures
        self._forward_autocast: set[str] = set()
        self._scaled: list[Scaled] = []
        self._in_scaler_step = self._in_optimizer = False
        self._versions = self._gradient_versions()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what the loop does in the block; outside of it nothing is left replaced."""
        seams: list[tuple[Any, str, Before, Any]] = [
            (torch.autograd, "backward", self._backward, None),
            # Every form of clipping calls it, also a function that was imported by name.
            (torch.nn.utils.clip_grad, _GROUPING, self._group, None),
            *(
                (defining_class(owner, "zero_grad"), "zero_grad", self._zero_grad, owner)
                for owner in (self._optimizer, self._model)
            ),
        ]
        if self._scaler is not None:
            seams += [
                (self._scaler, "scale", self._scale, None),
                (self._scaler, "unscale_", self._unscale, None),
                (self._scaler, "step", self._scaler_step, None),
                (self._scaler, "update", self._scaler_update, None),
            ]
        safe = self._failures.safe
        with contextlib.ExitStack() as stack:
            for owner, name, before, only in seams:
                stack.enter_context(watched(owner, name, before, self._failures, only))
            # Hooks: schedulers and accelerate replace the step of an optimizer themselves.
            handles = [
                self._optimizer.register_step_pre_hook(safe(self._before_optimizer)),
                self._optimizer.register_step_post_hook(safe(self._after_optimizer)),
            ]
            for handle in handles:
                stack.callback(handle.remove)
            yield

    @contextlib.contextmanager
    def watching_forwards(self) -> Iterator[None]:
        """See forwards of the model in the block, by hooks in it."""
        see = self._failures.safe(self._see_autocast)
        handles = [
            module.register_forward_pre_hook(see, prepend=True)
            for module in _computing(self._model)
        ]
        after = self._failures.safe(self._after_forward)
        handles.append(self._model.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def measure(self) -> None:
        """Take the norm of the gradients, unless that was done."""
        if not self.log.has_norm:
            norm = gradient_norm(self._stepped_gradients())
            self.log.note_norm(norm, scaled=self.gradients == "scaled")

    def read(self) -> None:
        """Copy all numbers of the log to the host, in one piece."""
        self.log.read(None if self._scaler is None else self._scaler._get_scale_async())

    def _see_autocast(self, module: nn.Module, args: Any) -> None:
        if not self.paused and not in_backward():
            self._forward_autocast.add(_autocast_type(self._device.type))

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.paused or not torch.is_grad_enabled() or in_backward():
            return
        autocast = "+".join(sorted(self._forward_autocast)) or None
        self.autocast |= self._forward_autocast
        self._forward_autocast = set()
        types = types_of(floating_tensors(output))
        self.log.add(LoopEvent(event="forward", autocast=autocast, output=types))

    def _scale(self, outputs: Any) -> After:
        def after(scaled: Any) -> None:  # the scale is made in the first call
            for one, plain in zip(tree_leaves(scaled), tree_leaves(outputs), strict=True):
                self._scaled.append(Scaled(weakref.ref(one), plain.detach()))
            self.log.add(LoopEvent(event="scale"), scale=self._scaler._get_scale_async())

        return after

    def _backward(self, tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> After:
        if self.paused:
            return None
        self._notice_changes()
        before = self.log.place()
        if not self.has_gradients:
            self._notice_stale()
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        seeds = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors
        tensors = [root for root in roots if isinstance(root, Tensor)]
        plain = self._take_scaled(tensors)
        self.before_backward(tensors, bool(plain))
        loss = self._loss(roots, seeds or [None] * len(roots), plain)
        self.log.note_loss(loss)
        self.log.add(LoopEvent(event="backward", gradients=self.gradients), loss=loss)

        def after(_: Any) -> None:
            self.after_backward()
            versions = self._gradient_versions()
            if versions == self._versions and not reaches(tensors, self._parameters):
                self.log.go_back(before)  # another model's, such as the other half of a GAN
                return
            now: GradientState = "scaled" if plain else "unscaled"
            self.gradients = now if self.gradients in ("none", now) else "mixed"
            self.has_gradients = True
            self._versions = versions

        return after

    def _take_scaled(self, roots: Sequence[Tensor]) -> dict[int, Tensor | None]:
        """Those roots, by id, that are multiplied by the scale, and what they were before.

        That is not known, None, where the loop went on to work with what `scale` returned.
        """
        found: dict[int, Tensor | None] = {}
        for root in roots:
            same = [known for known in self._scaled if known.scaled() is root]
            others = [] if same else [known for known in self._scaled if known.is_behind(root)]
            for known in (*same, *others):
                known.used = True
                found[id(root)] = known.plain if same else None
        self._scaled = [known for known in self._scaled if not known.is_over]
        return found

    def _loss(
        self,
        roots: Sequence[Any],
        seeds: Sequence[Tensor | None],
        plain: Mapping[int, Tensor | None],
    ) -> Tensor:
        """The number whose gradient a backward computes, without the scale."""
        total = torch.zeros((), device=self._device)
        for root, seed in zip(roots, seeds, strict=True):
            if not isinstance(root, Tensor):  # an edge of the graph has no value
                continue
            value = plain.get(id(root))
            if value is None:
                value = root.detach()
                if id(root) in plain:
                    value = value.float() / self._scaler._get_scale_async().to(value.device)
            value = value.float()
            value = value if seed is None else value * seed.detach().float()
            total = total + value.sum().to(total.device)
        return total

    def _notice_stale(self) -> None:
        if stale := [p.grad for p in self._parameters if p.grad is not None]:
            self.log.add(LoopEvent(event="stale_gradients"), norm=gradient_norm(stale))

    def _zero_grad(self, *_: Any, **__: Any) -> After:
        self._notice_changes()
        if self._in_optimizer and self.has_gradients:  # of a closure, which computes others now
            self.measure()

        def after(_: Any) -> None:
            self.log.add(LoopEvent(event="zero_grad", gradients=self.gradients))
            self.backward_alone = self.backward_alone and not self.has_gradients
            self.gradients = "none"
            self._versions = self._gradient_versions()

        return after

    def _gradient_versions(self) -> dict[int, tuple[int, int]]:
        return {
            number: (id(gradient), gradient._version)
            for number, parameter in enumerate(self._parameters)
            if (gradient := parameter.grad) is not None
        }

    def _notice_changes(self) -> None:
        """Note that something else wrote to gradients since the last event."""
        versions = self._gradient_versions()
        if versions == self._versions:
            return
        if self._versions and not versions:
            self.log.add(LoopEvent(event="zero_grad", gradients=self.gradients))
            self.gradients = "none"
        else:
            self.log.add(LoopEvent(event="gradients_changed", gradients=self.gradients))
            self.has_gradients, self.backward_alone = True, False
        self._versions = versions

    def _use_gradients(self) -> None:
        self._notice_changes()
        if self.has_gradients:
            self.before_change()

    def _unscale(self, optimizer: Any, *_: Any, **__: Any) -> After:
        if optimizer is not self._optimizer:
            return None
        self._use_gradients()
        by = "scaler.step" if self._in_scaler_step else None
        self.log.add(LoopEvent(event="unscale", gradients=self.gradients, by=by))

        def after(_: Any) -> None:
            self.gradients = "unscaled" if self.gradients == "scaled" else self.gradients
            self._versions = self._gradient_versions()

        return after

    def _group(self, tensors: list[list[Tensor]], *_: Any, **__: Any) -> After:
        """Called in torch's clipping functions with the gradients, before they change them."""
        caller = sys._getframe(2)
        event = _CLIPPING.get(caller.f_code.co_name)
        clipped = {id(gradient) for gradient in tensors[0]}
        if event is None or clipped.isdisjoint(id(p.grad) for p in self._parameters):
            return None
        self._use_gradients()
        norm = gradient_norm(self._stepped_gradients())
        self.log.note_norm(norm, scaled=self.gradients == "scaled")
        limit = caller.f_locals["max_norm" if event == "clip_norm" else "clip_value"]
        self.log.add(LoopEvent(event=event, gradients=self.gradients, limit=limit), norm=norm)
        writes = 2 if event == "clip_value" and _in_groups(caller.f_locals, tensors[0]) else 1
        self._versions = {
            number: (gradient, version + (writes if gradient in clipped else 0))
            for number, (gradient, version) in self._versions.items()
        }
        return None

    def _scaler_step(self, optimizer: Any, *_: Any, **__: Any) -> After:
        if optimizer is not self._optimizer:
            return None
        self._use_gradients()
        self.before_update()
        self._in_scaler_step, self.stepped_optimizer = True, False

        def after(_: Any) -> None:
            self._in_scaler_step = False
            if not self.stepped_optimizer:
                self.log.add(LoopEvent(event="skipped_step", gradients=self.gradients))
            self._versions = self._gradient_versions()

        return after

    def _scaler_update(self, *_: Any, **__: Any) -> After:
        return lambda _: self.log.add(LoopEvent(event="scaler_update"))

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        by = "scaler.step" if self._in_scaler_step else None
        if by is None:
            self._use_gradients()
            if self.has_gradients:
                self.before_update()
        # A fused optimizer unscales inside, and leaves the weights as they are inside.
        unscales = getattr(optimizer, "grad_scale", None) is not None
        self.fused_skip = getattr(optimizer, "found_inf", None) is not None
        gradients = "unscaled" if unscales and self.gradients == "scaled" else self.gradients
        self.log.add(LoopEvent(event="optimizer_step", gradients=gradients, by=by))
        self._in_optimizer = True

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.stepped_optimizer, self._in_optimizer = True, False
        if self.has_gradients:  # that the optimizer's closure made
            self.measure()
        self._versions = self._gradient_versions()

    def _stepped_gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._stepped if parameter.grad is not None]


_GROUPING = "_group_tensors_by_device_and_dtype"
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


def _computing(model: nn.Module) -> list[nn.Module]:
    """Modules that have parameters of their own, in which autocast is on however deep it begins.

    Of many, `MAX_WATCHED_MODULES`, evenly spread; of a model without such modules, itself.
    """
    found = [m for m in model.modules() if m._parameters]
    return found[:: -(-len(found) // MAX_WATCHED_MODULES)] if found else [model]


def _autocast_type(device_type: str) -> str:
    if not torch.is_autocast_enabled(device_type):
        return "off"
    return dtype_name(torch.get_autocast_dtype(device_type))
