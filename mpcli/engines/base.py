"""What the trainer asks of an engine: run one optimizer step exactly as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mpcli.checkpoint import Part
from mpcli.data.batch import Batch
from mpcli.precision.statistics import Key, Pending
from mpcli.records import ModuleTypes

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, int]]
"""(model, micro-batch) -> the fp32 sum of its losses, and how many things were summed."""


@dataclass(frozen=True)
class Outcome:
    """One attempted step, as fp32 scalar tensors on the device: nobody waits for them.

    All are the same in every rank.

    Attributes:
        loss: of the global batch: the mean over all that it sums.
        grad_norm: global L2 norm of the unscaled gradients, before clipping.
        scale: loss scale that the step used.
        found_inf: 1 where a gradient was NaN or infinite and the step changed nothing, else 0.
        layers: the tensors of the step, if it was sampled.
    """

    loss: Tensor
    grad_norm: Tensor
    scale: Tensor
    found_inf: Tensor
    layers: Pending | None = None


class Engine(Protocol):
    """Where and how a step runs. Nothing in a step reads a device value on the host.

    With several ranks all of them call the same methods in the same order.

    Attributes:
        observed: per module, the types that the first micro-batch was computed in; None before,
            and where it could not be observed.
        library_config: what a library was told that the engine stands on, as JSON; None without.
    """

    observed: dict[str, ModuleTypes] | None
    library_config: dict[str, Any] | None

    def sample(self, shadow: Mapping[Key, Tensor] | None = None) -> None:
        """Look at the tensors of the coming step, which is the same for that.

        Args:
            shadow: what they would be in fp32, sampled and not scaled.
        """

    def weights(self) -> dict[str, Tensor]:
        """The exact weights and the buffers that the next forward has, by name: no averages."""

    def random_state(self) -> dict[str, Tensor]:
        """Of the generators that a forward draws from, by device."""

    def accumulate(
        self, loss_function: LossFunction, batch: Batch, total_weight: int, *, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            batch: of this rank's share of the global batch.
            total_weight: of the whole global batch; the loss is the micro-batch's sum over it.
            last: whether this is the step's last micro-batch.

        Returns:
            The micro-batch's share of the loss: fp32, detached.
        """

    def step(self) -> Outcome:
        """Unscale, check, clip, update or skip, advance loss scale and averages."""

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """The model in evaluation mode, without gradients.

        Its weights are those to evaluate: their average with `train.ema`.
        """

    def checkpoint(self) -> tuple[Mapping[str, Tensor | Part], dict[str, Any]]:
        """All that the next step follows from, bit for bit: tensors, and numbers for JSON.

        The tensors are those that the next step writes to, not copies; any memory format. Each rank
        has the parts that it holds; what every rank holds is whole, and rank 0's is as good as any.
        """

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Become what `checkpoint` was taken of.

        Raises:
            UserError: exit 4, it was taken of something else.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The model's weights and buffers: averages or masters in fp32 where there are any.

        Whole in rank 0; the others may have nothing.
        """

    def memory(self) -> tuple[int, int]:
        """Bytes allocated now and at the peak: of the GPU, or of this process on a CPU."""
