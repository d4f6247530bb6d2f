"""A copy of the model in each rank, whose gradients are added up while backward runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpcli.engines.local import LocalEngine
from mpcli.precision.formats import DTYPES
from mpcli.precision.numerics import Numerics
from mpcli.recipe.engine import Ddp
from mpcli.recipe.recipe import Recipe


def mode_problems(meaning: Numerics) -> list[str]:
    """Why this engine cannot honour a precision mode; empty where it can."""
    if meaning.masters:
        return [
            f"`{meaning.mode}` adds gradients up in fp32, and DistributedDataParallel does in the "
            "type of the weights"
        ]
    return []


class DdpEngine(LocalEngine):
    """The local step, on gradients that are sums over the ranks: so every rank takes the same one.

    Each rank's loss is already a share of the global batch's, so gradients are added up and not
    averaged. BatchNorm's running statistics are rank 0's: others differ and are not used.
    """

    def _take_over(self, recipe: Recipe, meaning: Numerics, fp32_modules: Collection[str]) -> None:
        options = recipe.engine
        assert isinstance(options, Ddp)
        if options.sync_batch_norm:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        super()._take_over(recipe, meaning, fp32_modules)
        with warnings.catch_warnings():
            # What torch 2.14 wants instead is not there before.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            self.ddp = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                bucket_cap_mb=options.bucket_megabytes,
                find_unused_parameters=options.find_unused_parameters,
                gradient_as_bucket_view=options.gradient_as_bucket_view,
                static_graph=options.static_graph,
            )
        compressed = DTYPES.get(options.gradient_compression)
        self.ddp.register_comm_hook(None, _summed(compressed))
        self.forward_model = self.ddp

    def _synchronising(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.ddp.no_sync()

    def _over_ranks(
        self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.ranks.sum_(loss.clone()), grad_norm, found_inf


def _summed(dtype: torch.dtype | None) -> Callable[..., torch.futures.Future[Tensor]]:
    """A hook that adds up a bucket, rounded to `dtype` for its way; torch's own ones average."""

    # torch looks at annotations and refuses strings.
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        gradients = bucket.buffer()
        sent = gradients if dtype is None else gradients.to(dtype)

        def received(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            total = future.value()[0]
            return total if dtype is None else gradients.copy_(total)

        return dist.all_reduce(sent, async_op=True).get_future().then(received)

    return hook
