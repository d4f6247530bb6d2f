"""What an optimizer does in a step that it should leave out: to its state, and to the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpcli.precision.statistics import sampled
from mpcli.recorder.describe import SteppedParameter


class StateBefore:
    """State and weights before a step: at most 16,384 elements of each tensor.

    torch's fused SGD makes its momentum in the first step out of uninitialized memory and relies on
    the kernel to fill it, which the kernel does not do in a step that it leaves out (torch 2.14).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[SteppedParameter]
    ) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._before = dict(self._now())
        self._weights = self._weights_now()

    def changed(self) -> list[str]:
        """`parameter.key` of the tensors that are others now; zeros are what no state is."""
        return [name for name, now in self._now() if not _same(now, self._before.get(name))]

    def left_weights(self) -> bool:
        """Whether the weights are what they were: it left the step out itself."""
        return all(map(_same, self._weights_now(), self._weights))

    def _weights_now(self) -> list[Tensor]:
        return [sampled(parameter.tensor.detach()) for parameter in self._parameters]

    def _now(self) -> Iterator[tuple[str, Tensor]]:
        for parameter in self._parameters:
            for key, value in self._optimizer.state.get(parameter.tensor, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield f"{parameter.name}.{key}", sampled(value.detach())


def _same(now: Tensor, before: Tensor | None) -> bool:
    before = torch.zeros_like(now) if before is None else before
    return torch.allclose(now, before, rtol=0.0, atol=0.0, equal_nan=True)
