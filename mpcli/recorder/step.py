"""One step of somebody's loop, watched from its beginning to its end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
)

from mpcli.precision.local_shadow import LocalShadows
from mpcli.precision.observe import observed_types
from mpcli.precision.probe import parameter_key
from mpcli.precision.statistics import Key, Samples
from mpcli.recorder.describe import SteppedParameter
from mpcli.recorder.events import StepEvents
from mpcli.recorder.first_call import LoopObserver, at_first_call
from mpcli.recorder.origin import ForwardCalls, find_origin, nonfinite_weights
from mpcli.recorder.patches import Failures
from mpcli.recorder.state import StateBefore
from mpcli.recorder.tensors import all_finite
from mpcli.records import LayerRecord, LoopEvent, ModuleTypes, NonFiniteOrigin

_NO_ROOM = (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit)
"""Ends of a step after which nothing is computed again."""

MAX_NAMED = 10
"""Buffers that are not finite, and tensors of the optimizer's state that changed, of one step."""


@dataclass(frozen=True)
class Watched:
    """What a recorder was given; `compiled`: that this shows in the model itself."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    parameters: list[SteppedParameter]
    device: torch.device
    compiled: bool
    failures: Failures = field(default_factory=Failures)

    @property
    def modules(self) -> bool:
        """Whether modules can be watched: not in compiled code, which hooks would compile again."""
        return not (self.compiled or self.failures.saw_compiling)


@dataclass
class StepFindings:
    """What was found in a step, once it is over.

    `origin` and `no_origin` as in `FlightRecord`; `is_finite`: loss and gradients.
    """

    events: list[LoopEvent]
    left_out: int
    loss: float
    lr: float
    grad_norm: float
    scale: float
    applied: bool
    is_finite: bool
    seconds: float
    origin: NonFiniteOrigin | None = None
    no_origin: str | None = None
    random_state: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    observed: dict[str, ModuleTypes] | None = None


class WatchedStep:
    """Gathers one step's findings; nothing of the loop is kept when it is over.

    Args:
        samples: to be filled in this step; None where it is not a sampled one.
        observe: the types of operations.
        wants_origin: asked with whether the loss is finite, before a search.
    """

    def __init__(
        self,
        watched: Watched,
        step: int,
        attempt: int,
        samples: Samples | None,
        *,
        observe: bool,
        wants_origin: Callable[[bool], bool],
    ) -> None:
        self._watched = watched
        self._step, self._attempt = step, attempt
        self._samples = samples
        self._wants_origin = wants_origin
        self._observer = None
        if observe and watched.modules:
            self._observer = LoopObserver(watched.model, watched.failures)
        self._observed: dict[str, ModuleTypes] | None = None
        self._shadows: LocalShadows | None = None
        self._calls = ForwardCalls(watched.model, watched.device, watched.failures)
        self._before: dict[Key, tuple[Tensor, Tensor]] = {}  # weights; where they had a gradient
        self._state: StateBefore | None = None  # of a step that may be left out
        self._scale: Tensor | float = 1.0
        self._lr: Any = watched.optimizer.param_groups[0]["lr"]
        self._is_read = self._is_sampled = False
        self._is_finite = True
        self._is_loss_finite = True
        self._origin: NonFiniteOrigin | None = None
        self._no_origin: str | None = None
        self._modules = contextlib.ExitStack()  # hooks in the model, until the gradients are there
        stepped = [parameter.tensor for parameter in watched.parameters]
        every = {id(t): t for t in (*watched.model.parameters(), *stepped)}
        self._events = StepEvents(
            watched.model,
            watched.optimizer,
            watched.scaler,
            list(every.values()),
            stepped,
            watched.failures,
        )

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the loop in the block."""
        self._started = time.perf_counter()
        safe = self._watched.failures.safe
        self._events.before_backward = safe(self._before_backward)
        self._events.after_backward = safe(self._after_backward)
        self._events.before_change = safe(self._before_change)
        self._events.before_update = safe(self._before_update)
        with self._events.watching(), self._modules:
            safe(self._begin)()
            try:
                yield
            finally:
                safe(self._stop_observing)()

    def findings(self, error: BaseException | None) -> StepFindings:
        """After the block, which an error may have ended."""
        events, log = self._events, self._events.log
        if not (events.has_gradients or isinstance(error, _NO_ROOM)):
            # Loops often look at the loss themselves, and go no further.
            self._search_without_backward()
        if not (self._is_read or events.stepped_optimizer):
            self._before_update()
        events.read()
        self._judge()
        if not (self._is_finite or self._is_read):  # an optimizer that calls the loop's closure
            self._no_origin = "the weights had changed when it was noticed"
        leaves_out = events.fused_skip or (self._state is not None and self._state.left_weights())
        applied = events.stepped_optimizer and (self._is_finite or not leaves_out)
        if events.stepped_optimizer and not applied:
            events.log.add(LoopEvent(event="skipped_step", gradients=events.gradients))
            for name in self._state.changed()[:MAX_NAMED] if self._state else ():
                events.log.add(LoopEvent(event="state_changed", name=name))
        if self._samples is not None or not self._is_finite:
            for name in self._nonfinite_buffers():
                events.log.add(LoopEvent(event="buffer_nonfinite", name=name))
        calls = self._calls.calls
        return StepFindings(
            events=[e for e in log.events if e.event != "stale_gradients" or e.norm != 0],
            left_out=log.left_out,
            loss=sum(log.losses) if log.losses else math.nan,
            lr=float(self._lr),
            grad_norm=log.norm,
            scale=log.scale,
            applied=applied,
            is_finite=self._is_finite,
            seconds=time.perf_counter() - self._started,
            origin=self._origin,
            no_origin=self._no_origin,
            random_state=calls[0].random.by_device if calls else {},
            layers=self._layers(applied),
            observed=self._observed,
        )

    def _begin(self) -> None:
        scaler, modes = self._watched.scaler, len(_get_current_dispatch_mode_stack())
        if self._samples is not None:
            if scaler is not None and scaler.is_enabled():
                scale = scaler._get_scale_async()
                self._scale = scaler.get_scale() if scale is None else scale  # no read: the first
            self._samples.begin(self._scale)
        if self._watched.modules:

            def watch() -> None:
                # A mode that the loop entered since would be left in its place.
                self._watch_modules(observe=len(_get_current_dispatch_mode_stack()) == modes)

            first = at_first_call(self._watched.model, watch, self._watched.failures)
            self._modules.enter_context(first)

    def _watch_modules(self, *, observe: bool) -> None:
        self._modules.enter_context(self._calls.watching())
        self._modules.enter_context(self._events.watching_forwards())
        if self._samples is not None:
            safe = self._watched.failures.safe
            self._shadows = LocalShadows(self._watched.model, self._samples, self._scale, safe)
            self._modules.enter_context(self._shadows.watching())
        if self._observer and observe:
            self._observer.__enter__()

    def _stop_observing(self) -> None:
        """Before the first backward, or at the end: the loop may have entered other modes since."""
        if self._observer and _get_current_dispatch_mode() is self._observer:
            self._observer.__exit__(None, None, None)

    def _before_backward(self, roots: list[Tensor], scaled: bool) -> None:
        self._stop_observing()
        if self._shadows:
            parameters = self._watched.model.parameters()
            self._shadows.before_backward(roots, parameters, scaled=scaled)

    def _after_backward(self) -> None:
        if self._shadows:
            self._shadows.after_backward()

    def _before_change(self) -> None:
        """The gradients are whole, and nobody has changed them yet."""
        if self._is_sampled:
            return
        self._is_sampled = True
        if self._observer and self._observer.has_observed:
            self._observed = observed_types(self._watched.model, self._observer)
        if self._samples is None:
            return
        scaled = self._events.gradients == "scaled"
        shadows = self._shadows if self._events.backward_alone else None
        for parameter in self._watched.parameters:
            tensor, gradient = parameter.tensor, parameter.tensor.grad
            if gradient is not None and not gradient.is_sparse:
                shadow = shadows.of_gradient(tensor) if shadows else None
                self._samples.add(tensor, parameter_key(parameter.name, "weight"))
                key = parameter_key(parameter.name, "grad")
                self._samples.add(gradient, key, scaled=scaled, shadow=shadow)

    def _before_update(self) -> None:
        """The one host read of a step, while the weights are still those that it began with."""
        if self._is_read:
            return
        self._is_read = True
        self._lr = self._watched.optimizer.param_groups[0]["lr"]
        self._events.measure()
        self._events.read()
        self._modules.close()
        self._judge()
        if not self._is_finite:
            self._state = StateBefore(self._watched.optimizer, self._watched.parameters)
            self._search()
        elif self._samples is not None:
            for parameter in self._watched.parameters:
                if (gradient := parameter.tensor.grad) is not None and not gradient.is_sparse:
                    key = parameter_key(parameter.name, "update")
                    # The loop may zero the gradient in place before the step is over.
                    self._before[key] = (parameter.tensor.detach().clone(), gradient != 0)

    def _judge(self) -> None:
        losses, norm = self._events.log.losses, self._events.log.norm
        self._is_loss_finite = all(map(math.isfinite, losses))
        is_norm_finite = math.isfinite(norm) or all_finite(self._gradients())  # it may overflow
        self._is_finite = self._is_finite and self._is_loss_finite and is_norm_finite

    def _gradients(self) -> list[Tensor]:
        found = [parameter.tensor.grad for parameter in self._watched.parameters]
        return [gradient for gradient in found if gradient is not None]

    def _search(self) -> None:
        self._origin = nonfinite_weights(self._watched.model)
        if self._origin is not None:  # then what any module makes of them is not the matter
            return
        if not self._watched.modules:
            self._no_origin = "the model is compiled"
        elif not self._wants_origin(self._is_loss_finite):
            self._no_origin = "it was looked for in earlier steps already"
        else:
            calls, losses = self._calls.calls, self._events.log.losses
            self._events.paused = True
            self._origin, self._no_origin = find_origin(self._watched.model, calls, losses)
            self._events.paused = False

    def _search_without_backward(self) -> None:
        calls = self._calls.calls
        if self._watched.modules and calls and self._wants_origin(False):
            self._origin, _ = find_origin(self._watched.model, calls, [])
            if self._origin is not None:
                self._origin = nonfinite_weights(self._watched.model) or self._origin

    def _nonfinite_buffers(self) -> list[str]:
        named = self._watched.model.named_buffers()
        found = [n for n, b in named if b.is_floating_point() and not all_finite([b])]
        return found[:MAX_NAMED]

    def _layers(self, applied: bool) -> list[LayerRecord]:
        if self._samples is None:
            return []
        for parameter in self._watched.parameters if applied else ():
            key = parameter_key(parameter.name, "update")
            if before := self._before.get(key):
                self._samples.add_update(key, before[0], parameter.tensor.detach(), before[1])
        self._before.clear()
        stored = {parameter.dtype for parameter in self._watched.model.parameters()}
        saw_fp16 = self._shadows is not None and self._shadows.saw_fp16
        autocast = self._events.autocast
        self._samples.through_fp16 = saw_fp16 or "fp16" in autocast or torch.float16 in stored
        pending = self._samples.finish(0.0 if applied else 1.0)
        return pending.records(self._step, self._attempt) or []
