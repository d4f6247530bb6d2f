"""The events of one step and their numbers, which stay on the device until one copy of them all."""

from __future__ import annotations

import torch
from torch import Tensor

from mpcli.records import LoopEvent

MAX_EVENTS = 200
"""Of one step that are kept; more micro-batches than that tell nothing new."""


class EventLog:
    """Events in order; numbers are there after `read`.

    Args:
        device: that the numbers are brought together on.

    Attributes:
        events: the first `MAX_EVENTS`; `left_out` is the number of others.
        losses: of every backward, without the scale.
        norm: of the gradients as they were first used, without the scale; 0 without gradients.
        has_norm: whether it was noted.
        scale: of the loss; 1 without a scaler.
    """

    def __init__(self, device: torch.device) -> None:
        self.events: list[LoopEvent] = []
        self.left_out = 0
        self.losses: list[float] = []
        self.norm = 0.0
        self.has_norm = False
        self.scale = 1.0
        self._device = device
        self._numbers: list[tuple[int, str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._norm: tuple[Tensor, bool] | None = None

    def place(self) -> tuple[int, int, int, int]:
        """Where it is now, for `go_back`."""
        return len(self.events), self.left_out, len(self._numbers), len(self._losses)

    def go_back(self, place: tuple[int, int, int, int]) -> None:
        """Forget what was noted since, if nothing was read."""
        events, self.left_out, numbers, losses = place
        del self.events[events:], self._numbers[numbers:], self._losses[losses:]

    def add(self, event: LoopEvent, **numbers: Tensor | None) -> None:
        """Note an event, and those of its fields that are still on the device."""
        if len(self.events) == MAX_EVENTS:
            self.left_out += 1
            return
        for name, number in numbers.items():
            if number is not None:
                self._numbers.append((len(self.events), name, number))
        self.events.append(event)

    def note_loss(self, loss: Tensor) -> None:
        """Note what a backward was called on, a scalar."""
        self._losses.append(loss)

    def note_norm(self, norm: Tensor, *, scaled: bool) -> None:
        """Note the gradients' norm, a scalar, and whether it has to be unscaled."""
        if not self.has_norm:
            self._norm, self.has_norm = (norm, scaled), True

    def read(self, scale: Tensor | None) -> None:
        """Copy all numbers to the host, in one piece.

        Args:
            scale: of the loss, a scalar; None without a scaler.
        """
        tensors = [number for _, _, number in self._numbers] + self._losses
        if self._norm:
            tensors.append(self._norm[0])
        if not tensors:
            return
        tensors.append(torch.ones((), device=self._device) if scale is None else scale)
        together = [tensor.detach().to(self._device).double().reshape(()) for tensor in tensors]
        *values, self.scale = torch.stack(together).tolist()
        if self._norm:
            self.norm = values.pop() / (self.scale if self._norm[1] else 1.0)
        for (number, name, _), value in zip(self._numbers, values, strict=False):
            self.events[number] = self.events[number].model_copy(update={name: value})
        self.losses += values[len(self._numbers) :]
        self._numbers, self._losses, self._norm = [], [], None
