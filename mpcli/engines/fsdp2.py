"""Weights, gradients and optimizer state divided among the ranks, block by block."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from mpcli.checkpoint import Part
from mpcli.data.batch import Batch
from mpcli.engines.base import LossFunction
from mpcli.engines.divided import DividedEngine, refuse_numbers
from mpcli.precision.convert import convert, modules_inside, outermost_islands
from mpcli.precision.formats import DTYPES
from mpcli.precision.numerics import Numerics
from mpcli.precision.observe import TypesObserver
from mpcli.recipe.engine import Fsdp2
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.train import Clip, ClipAgc


def mode_problems(meaning: Numerics) -> list[str]:
    """Why this engine cannot honour a precision mode; empty where it can."""
    if meaning.half_weights and not meaning.masters:
        return [f"`{meaning.mode}` keeps no fp32 weights, and fully_shard's shards are fp32"]
    return []


def clip_problems(clip: Clip | None) -> list[str]:
    """Why this engine cannot clip as a recipe says; empty where it can."""
    if isinstance(clip, ClipAgc):
        return ["`agc` needs norms of whole vectors, which fully_shard divides among processes"]
    return []


class Fsdp2Engine(DividedEngine):
    """The local step on this rank's shards: plain fp32 tensors, in the memory of the parameters.

    torch divides each parameter by rows, gathers a block's before its forward and backward, and
    adds gradients up into the shards. Between steps the model's parameters are such shards.
    BatchNorm's running statistics are rank 0's: others differ and are not used.
    """

    def _take_over(self, recipe: Recipe, meaning: Numerics, fp32_modules: Collection[str]) -> None:
        options = recipe.engine
        assert isinstance(options, Fsdp2)
        model = self.model
        refuse_numbers(model, "fully_shard")
        if options.cpu_offload:
            self.home = torch.device("cpu")
        convert(model, meaning, self.device, fp32_modules, round_parameters=False)
        inside = modules_inside(model, fp32_modules)
        self.forward_types = {  # of the parameters, as they are gathered
            name: torch.float32 if _owner(model, name) in inside else meaning.weights
            for name, _ in model.named_parameters()
        }
        mesh = init_device_mesh(self.device.type, (self.ranks.world_size,))
        islands = outermost_islands(model, fp32_modules) if meaning.half_weights else set()
        for parameter in model.parameters():
            # By rows, so not channels last; activations keep the layout that the inputs have.
            parameter.data = parameter.data.contiguous()
        _divide(model, mesh, options, meaning.weights, islands)
        divided: dict[str, Any] = dict(model.named_parameters())
        self._divided: dict[str, DTensor] = divided
        self.shapes = {name: p.shape for name, p in divided.items()}
        self.parts = {name: p.detach().to_local() for name, p in divided.items()}
        self.parameters = self.masters = [self.parts[name] for name in self.names]
        self.frozen = {}
        self._observer: TypesObserver | None = None

    def accumulate(
        self, loss_function: LossFunction, batch: Batch, total_weight: int, *, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch; the last one's adds gradients over the ranks."""
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        loss = super().accumulate(loss_function, batch, total_weight, last=last)
        if last:
            self._take_gradients()
        return loss

    def _take_gradients(self) -> None:
        """From the parameters, where torch leaves them, to the shards."""
        for name, parameter in self._divided.items():
            gradient = cast(DTensor | None, parameter.grad)
            self.parts[name].grad = None if gradient is None else gradient.to_local()
            parameter.grad = None
        if self._observer is not None:
            self.observed = self._types_in_forward(self._observer)
            self._observer = None

    def _observed(self, observer: TypesObserver) -> None:
        self._observer = observer  # parameters have gradients only after the last micro-batch

    def _whole(self, name: str, part: Tensor) -> Tensor:
        parameter = self._divided[name]
        divided = DTensor.from_local(
            part.detach().to(self.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return divided.full_tensor()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model under autocast, with its averaged weights when there are any."""
        with super().evaluating() as model:
            try:
                yield model
            finally:
                # Without a backward torch keeps what it gathered, for the next step too.
                for module in self.model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def checkpoint(  # type: ignore[override]  # this engine's has parts, as the protocol says
        self,
    ) -> tuple[dict[str, Tensor | Part], dict[str, Any]]:
        """All that the next step follows from, bit for bit: tensors, and numbers for JSON."""
        tensors, numbers = super().checkpoint()
        parts: dict[str, Tensor | Part] = dict(tensors)
        for key, tensor in tensors.items():
            if name := self._divided_in(key, tensor):
                shape = tuple(self._divided[name].shape)
                offsets = (self._rows(name).start, *(0,) * len(shape[1:]))
                parts[key] = Part(tensor, offsets, shape)
        return parts, numbers

    def _part_of(self, name: str, whole: Tensor) -> Tensor:
        return whole[self._rows(name)]

    def _rows(self, name: str) -> slice:
        """This rank's, as torch.chunk divides them."""
        rows = self._divided[name].shape[0]
        each = -(-rows // self.ranks.world_size)
        start = min(rows, self.ranks.rank * each)
        return slice(start, min(rows, start + each))


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _divide(
    model: nn.Module,
    mesh: DeviceMesh,
    options: Fsdp2,
    dtype: torch.dtype,
    islands: Collection[nn.Module],
) -> None:
    """Divide every parameter, group by group: what is gathered together.

    A group has one type in forward, so islands of another have groups of their own, each one its
    own because it is run by itself; only those that share a parameter are one group. What blocks
    share with others belongs to the whole model's group.

    Args:
        dtype: of the parameters in forward, but for those of `islands`.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    policy = offload if options.cpu_offload else OffloadPolicy()

    # It says of a view what `_own_memory` heeds; of the whole model's it does not matter.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)

    def divide(modules: list[nn.Module], dtype: torch.dtype, *, reshard: bool) -> None:
        for module in modules:
            if module is not model:
                module.register_forward_hook(_own_memory)
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh,
            reshard_after_forward=reshard,
            # Gradients of micro-batches add up in fp32, whatever type they travel in. Inputs and
            # outputs are cast by `convert`, as on one device.
            mp_policy=MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            offload_policy=policy,
        )

    reshard = options.reshard_after_forward
    names = {module: type(module).__name__ for module in model.modules()}
    in_order = [module for module in model.modules() if module in islands]
    shared = [island for island in in_order if shares(model, island)]
    for group in ([shared] if shared else []) + [[i] for i in in_order if i not in shared]:
        if any(True for module in group for _ in module.parameters()):
            divide(group, torch.float32, reshard=reshard)
    inside = {module for island in islands for module in island.modules()}
    for block in blocks(model):
        if block is not model and block not in inside and not shares(model, block):
            divide([block], dtype, reshard=reshard)
    # Its backward begins with what its forward ended with.
    divide([model], torch.float32 if model in inside else dtype, reshard=False)
    for module, name in names.items():
        if isinstance(module, FSDPModule):
            # torch made a subclass, whose name is nothing for people or a model's config.
            type(module).__name__ = type(module).__qualname__ = name
            _add_up(module, options)


def _own_memory(module: nn.Module, inputs: object, output: Any) -> Any:
    """Outputs that are no views: what is added to one in place would cut torch's hook off, which
    gathers the weights for backward."""

    def own(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf._is_view() else leaf

    return tree_map(own, output)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What the outermost lists of modules hold and has parameters."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        for child in module:
            if type(child).forward is nn.Module.forward:  # a list in a list
                yield from blocks(child)
            elif any(True for _ in child.parameters()):
                yield child
    else:
        for child in module.children():
            yield from blocks(child)


def shares(model: nn.Module, part: nn.Module) -> bool:
    """Whether a part of a model has a parameter that is also outside of it."""
    inside = set(part.modules())
    outside = {p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    return any(parameter in outside for parameter in part.parameters())


def _add_up(module: FSDPModule, options: Fsdp2) -> None:
    """Gradients are sums over the ranks, in the recipe's type; torch's default is their mean."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    if options.reduce_dtype != "fp32":
        rounded: Any = _Rounded(DTYPES[options.reduce_dtype])
        module.set_custom_reduce_scatter(rounded)


_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Has the first name from torch 2.14 on, which warns of the second."""


class _Rounded:
    """Adds up fp32 gradients that travel in another type.

    FSDP's own `reduce_dtype` would also be the type that micro-batches accumulate in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent, and for what comes."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Of all inputs' sum this rank's part."""
        received = torch.empty_like(output_tensor, dtype=self.dtype)
        _reduce_scatter(received, input_tensor.to(self.dtype), group=group, op=op)
        output_tensor.copy_(received)
