"""A step's shadow: the same batch, weights and random numbers, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.engines.base import LossFunction
from mpcli.precision.numerics import numeric_settings
from mpcli.precision.probe import ActivationHooks, parameter_key
from mpcli.precision.statistics import Key, Samples
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.precision import Precision


class Shadow:
    """A model that computes in fp32 what another one computes in less.

    Args:
        build_model: a fresh fp32 model on the device, whatever its weights; called once, when the
            first shadow is wanted.
    """

    def __init__(
        self, build_model: Callable[[], nn.Module], device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self._ranks = ranks
        self._build_model = build_model
        self._device = device
        self._forked = [device] if device.type == "cuda" else []  # whose random numbers stay
        self._model: nn.Module | None = None
        self._samples = Samples(device)

    def samples(
        self,
        weights: Mapping[str, Tensor],
        loss_function: LossFunction,
        batches: Sequence[Batch],
        total_weight: int,
    ) -> dict[Key, Tensor]:
        """What the tensors of the coming step would be: sampled, and not scaled.

        The random numbers are those that the step itself will draw. With several ranks all call
        this; gradients are the sums of theirs.

        Args:
            weights: parameters and buffers by their names in the model.
            batches: this rank's micro-batches of the step; activations are of the first one.
        """
        model = self._filled(weights)
        self._samples.begin(1.0, keep=True)
        with torch.random.fork_rng(self._forked), numeric_settings(Precision(), self._device):
            with ActivationHooks(model, self._samples):
                self._backward(model, loss_function, batches[0], total_weight)
            for batch in batches[1:]:
                self._backward(model, loss_function, batch, total_weight)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self._ranks.sum_(parameter.grad)
                self._samples.add(parameter.grad, parameter_key(name, "grad"))
                parameter.grad = None
        return self._samples.kept

    @staticmethod
    def _backward(
        model: nn.Module, loss_function: LossFunction, batch: Batch, total_weight: int
    ) -> None:
        loss_sum, _ = loss_function(model, batch)
        (loss_sum / total_weight).backward()

    @torch.no_grad()
    def _filled(self, weights: Mapping[str, Tensor]) -> nn.Module:
        if self._model is None:
            with torch.random.fork_rng(self._forked):
                self._model = self._build_model()
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            tensor.copy_(weights[name])
        return self._model
