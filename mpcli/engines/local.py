"""One process, one device, eager PyTorch (or its compiler)."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.engines.base import LossFunction, Outcome
from mpcli.optim import build_optimizer, learning_rate_table
from mpcli.precision.numerics import autocast, numerics
from mpcli.precision.scaler import LossScaler
from mpcli.recipe.recipe import Recipe


class LocalEngine:
    """The transactional step: a step with a non-finite gradient changes nothing but the scale.

    `applied` counts applied steps on the device; the learning rate is `table[applied]`.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, device: torch.device, steps: int) -> None:
        self.device = device
        self.model = model
        self.clip = recipe.train.clip
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.scaler = LossScaler(recipe.precision.loss_scale, device)
        self.learning_rates = learning_rate_table(recipe.optim, steps, device)
        self.applied = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr = torch.zeros(1, dtype=torch.float32, device=device)
        self.optimizer = build_optimizer(recipe.optim, model, self.lr.view(()))
        self.autocast = autocast(numerics(recipe.precision.mode), device)
        # BatchNorm's statistics change in forward, before anyone knows that the step overflows.
        self.buffers = list(model.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.ema = recipe.train.ema
        self.average = [torch.zeros_like(p) for p in self.parameters] if self.ema else []
        if recipe.engine.compile:
            model.compile(dynamic=False)  # dynamic shapes fail with recomputed blocks (2.14.1)

    def accumulate(
        self, loss_function: LossFunction, batch: Batch, total_weight: int, *, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch; gradients add up in fp32."""
        with self.autocast:
            loss_sum, _ = loss_function(self.model, batch)
        # The gradient of the sum is scale / weight: the backward of (sum / weight) * scale.
        loss_sum.backward(self.scaler.scale / total_weight)
        return loss_sum.detach() / total_weight

    def step(self) -> Outcome:
        """Unscale, check, clip, update or skip, advance loss scale and averages."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        found_inf = self.scaler.unscale_(gradients)
        grad_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.clip is not None:
            torch._foreach_mul_(gradients, (self.clip.max_norm / (grad_norm + 1e-6)).clamp_max(1.0))

        torch.index_select(self.learning_rates, 0, self.applied, out=self.lr)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by fused kernels
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.applied += found_inf.logical_not()
        self._keep_or_restore_buffers(found_inf)
        if self.ema:
            self._move_average(self.ema, found_inf)

        outcome = Outcome(grad_norm, self.scaler.scale, found_inf)
        self.scaler.update(found_inf)
        return outcome

    def _keep_or_restore_buffers(self, found_inf: Tensor) -> None:
        if not self.buffers:
            return
        skipped = found_inf > 0
        for buffer, before in zip(self.buffers, self.buffers_before, strict=True):
            torch.where(skipped, before, buffer, out=before)
        torch._foreach_copy_(self.buffers, self.buffers_before)

    @torch.no_grad()
    def _move_average(self, decay: float, found_inf: Tensor) -> None:
        share = (1.0 - decay) * (1.0 - found_inf)
        apart = torch._foreach_sub(self.parameters, self.average)
        torch._foreach_add_(self.average, torch._foreach_mul(apart, share))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model under autocast, with its averaged weights when there are any.

        The average begins at zero and is divided by 1 - decay^applied, as Adam's moments are
        (Kingma & Ba 2015, section 3): a mean of the weights after each step, to which the random
        initial weights do not belong.
        """
        with torch.no_grad(), self.autocast:
            applied = self.applied.item() if self.ema else 0
            if not self.ema or not applied:
                yield self.model
                return
            trained = [p.clone() for p in self.parameters]
            torch._foreach_copy_(
                self.parameters, torch._foreach_div(self.average, 1.0 - self.ema**applied)
            )
            try:
                yield self.model
            finally:
                torch._foreach_copy_(self.parameters, trained)

    def memory(self) -> tuple[int, int]:
        """Bytes allocated now and at the peak: of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return (
                torch.cuda.memory_allocated(self.device),
                torch.cuda.max_memory_allocated(self.device),
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
        statm = _statm(os.getpid())
        resident = int(os.pread(statm, 64, 0).split()[1]) * PAGE if statm is not None else peak
        return resident, max(resident, peak)  # the kernel notes peaks late


PAGE = resource.getpagesize()


@functools.cache
def _statm(process: int) -> int | None:
    """Descriptor of the process's memory counters, open for good: they are read every step."""
    try:
        return os.open(f"/proc/{process}/statm", os.O_RDONLY)
    except OSError:  # not Linux
        return None
