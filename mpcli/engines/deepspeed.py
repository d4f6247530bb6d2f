"""Optimizer state, gradients and weights divided among the ranks by DeepSpeed."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn

from mpcli.data.batch import Batch
from mpcli.engines.base import LossFunction
from mpcli.engines.divided import DividedEngine, refuse_numbers
from mpcli.precision.convert import convert
from mpcli.precision.numerics import Numerics, autocast
from mpcli.precision.observe import TypesObserver
from mpcli.ranks import Ranks
from mpcli.recipe.engine import DeepSpeed
from mpcli.recipe.errors import user_error
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.train import Clip, ClipAgc

logger = logging.getLogger(__name__)

BUCKET = 2**26
"""Elements, at most, that are added up or gathered together: 256 MiB of fp32."""


def mode_problems(meaning: Numerics) -> list[str]:
    """Why this engine cannot honour a precision mode; empty where it can."""
    if meaning.half_weights:
        return [
            f"`{meaning.mode}` stores half weights beside fp32 islands, and DeepSpeed stores all "
            "weights in one type"
        ]
    return []


def clip_problems(clip: Clip | None) -> list[str]:
    """Why this engine cannot clip as a recipe says; empty where it can."""
    if isinstance(clip, ClipAgc):
        return ["`agc` needs norms of whole vectors, which ZeRO divides among processes"]
    return []


class DeepSpeedEngine(DividedEngine):
    """The local step on what ZeRO leaves in this rank (Rajbhandari et al. 2020).

    DeepSpeed divides, moves and gathers: it hands gradients that are averages over the ranks to
    each rank for its part of the weights, and takes stepped weights from there to all ranks. Its
    optimizer and its loss scale are not used: the step is the one of all engines, so every policy
    means the same, and no kernel has to be built. With `offload` parts, gradients and optimizer
    state are in host memory, and the step is taken there (ZeRO-Offload, Ren et al. 2021); without
    it the host reads nothing.

    BatchNorm's running statistics are rank 0's: others differ and are not used.
    """

    def _take_over(self, recipe: Recipe, meaning: Numerics, fp32_modules: Collection[str]) -> None:
        options = recipe.engine
        assert isinstance(options, DeepSpeed)
        model = self.model
        refuse_numbers(model, "ZeRO")
        if options.offload:
            self.home = torch.device("cpu")
        convert(model, meaning, self.device, fp32_modules)
        if meaning.autocast:  # DeepSpeed's forward turns the one around it off
            within = autocast(meaning, self.device)
            model.forward = functools.partial(_within, within, model.forward)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # ZeRO stores all in a row
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.forward_types = {name: p.dtype for name, p in model.named_parameters()}
        self._used: dict[str, None] = {}  # by the micro-batch, in the order of its backward
        self._used_before = 0  # by the step's earlier ones, as a checksum
        for name in self.names:
            used = functools.partial(self._note_used, name)
            model.get_parameter(name).register_hook(used)
        self.library_config = library_config(options, model, self.device)
        logger.info(
            "DeepSpeed: ZeRO-%d; torch's fused optimizer steps on %s, so no kernel is built",
            options.stage,
            self.home,
        )
        self.forward_model = engine = _initialized(
            model, self.library_config, self.device, self.ranks
        )
        self._engine: Any = engine
        zero: Any = engine.optimizer
        parameters = dict(model.named_parameters())
        self._zero: _Zero = (_Zero3 if options.stage == 3 else _Zero2)(zero, parameters)
        self.parts, self._starts = {}, {}
        for name, shape in self.shapes.items():
            self._starts[name], part = self._zero.part(name)
            # As many dimensions as the parameter: by them optimizers tell matrices from vectors.
            self.parts[name] = part.view(_part_shape(shape, part.numel()))
        self.parameters = self.masters = [self.parts[name] for name in self.names]
        self.frozen = {}
        self._observer: TypesObserver | None = None
        self._restored = False

    def _note_used(self, name: str, gradient: Tensor) -> None:
        self._used[name] = None

    def accumulate(
        self, loss_function: LossFunction, batch: Batch, total_weight: int, *, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch; its gradients are added to the parts'."""
        self._share_restored()
        loss = super().accumulate(loss_function, batch, total_weight, last=last)
        self._take_gradients(last=last)
        if not last:
            self._zero.end_step()
        return loss

    def _take_gradients(self, *, last: bool) -> None:
        """From where ZeRO leaves them to the parts.

        To DeepSpeed each micro-batch is a step. What it adds up itself it loses with offload, where
        the last micro-batch does not use a weight.
        """
        self._refuse_differences(last=last)
        gradients = self._zero.gradients()
        for name in self._used:
            part = self.parts[name]
            gradient = gradients[name].view(part.shape) if part.numel() else torch.empty_like(part)
            if not self.ranks.alone:
                gradient.mul_(self.ranks.world_size)  # it averages over the ranks
            if part.grad is not None:
                part.grad += gradient
            else:
                part.grad = gradient if last else gradient.clone()
        self._used.clear()
        if self._observer is not None:
            self.observed = self._types_in_forward(self._observer)
            self._observer = None

    def _refuse_differences(self, *, last: bool) -> None:
        """Check that the step's backwards were the same in all ranks.

        DeepSpeed adds gradients up by their place in the order, whosesoever they are. That nobody
        learns from such a sum the ranks tell each other on the host: no device is read.

        Raises:
            UserError: exit 2, in all ranks, they were not.
        """
        self._used_before = zlib.crc32(f"{[*self._used]}".encode(), self._used_before)
        if not last:
            return
        used, self._used_before = self._used_before, 0
        if not self.ranks.same(used):
            raise user_error(
                "processes used different weights in a step, and DeepSpeed needs the same in all",
                "use `kind: ddp` with `find_unused_parameters: true`, or a model that uses every "
                "weight for every batch",
                path="engine.kind",
            )

    def _observed(self, observer: TypesObserver) -> None:
        self._observer = observer  # parts have no gradients yet

    def _update(self, gradients: list[Tensor | None]) -> None:
        super()._update(gradients)
        self._zero.end_step()
        self._zero.share()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model under autocast, with its averaged weights when there are any."""
        self._share_restored()
        try:
            with super().evaluating() as model:
                if self.ema:
                    self._zero.share()
                yield model
        finally:
            if self.ema:
                self._zero.share()

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step follows from, bit for bit: whole in rank 0, which writes it.

        What ZeRO divides is no block of a parameter, so it is gathered, one after the other.
        """
        tensors, numbers = super().checkpoint()
        whole: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = self._divided_in(key, tensor)
            gathered = self._whole(name, tensor) if name else tensor
            if self.ranks.is_main:
                whole[key] = gathered.to(tensor.device)
        return whole, numbers

    def _go_on(self, tensors: Mapping[str, Tensor], attempted: int) -> None:
        super()._go_on(tensors, attempted)
        self._restored = True  # ranks restore one after the other, and share together

    def _share_restored(self) -> None:
        if self._restored:
            self._zero.share()
            self._restored = False

    def _part_of(self, name: str, whole: Tensor) -> Tensor:
        part, start = self.parts[name], self._starts[name]
        return whole.reshape(-1)[start : start + part.numel()].view(part.shape)

    def _whole(self, name: str, part: Tensor) -> Tensor:
        shape = self.shapes[name]
        if self.ranks.alone or not self._zero.divides(name):
            return part.view(shape)
        whole = torch.zeros(shape.numel(), dtype=part.dtype, device=self.device)
        start = self._starts[name]
        whole[start : start + part.numel()] = part.flatten()
        return self.ranks.sum_(whole).view(shape)


def library_config(options: DeepSpeed, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """What DeepSpeed is told, as JSON.

    Batch sizes, the learning rate and the loss scale are not its business: it gets the least that
    it takes.
    """
    elements = sum(parameter.numel() for parameter in model.parameters())
    vectors = [parameter.numel() for parameter in model.parameters() if parameter.ndim <= 1]
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero: dict[str, Any] = {
        "stage": options.stage,
        "reduce_bucket_size": min(BUCKET, elements),
        "allgather_bucket_size": min(BUCKET, elements + elements % 2),
    }
    if options.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": min(BUCKET, elements),
            # Norms and biases stay whole: to gather them takes longer than they are worth.
            "stage3_param_persistence_threshold": max(vectors, default=0) + 1,
            # They replace functions of torch for the whole process.
            "memory_efficient_linear": False,
            "override_module_apply": False,
        }
    if options.offload:
        zero["offload_optimizer"] = host
    if options.offload_parameters:
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _part_shape(shape: Size, elements: int) -> tuple[int, ...]:
    return (*(1,) * (len(shape) - 1), elements)


def _within(
    context: contextlib.AbstractContextManager[object],
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    with context:
        return forward(*args, **kwargs)


class _Zero(Protocol):
    """Where ZeRO keeps what this rank steps."""

    def part(self, name: str) -> tuple[int, Tensor]:
        """Where this rank's part of a parameter begins, and the part: fp32, one dimension."""

    def divides(self, name: str) -> bool:
        """Whether a parameter is divided among the ranks."""

    def gradients(self) -> dict[str, Tensor]:
        """Of the parts, as averages over the ranks, by name: fp32, one dimension.

        To be called between the last backward and `end_step`.
        """

    def end_step(self) -> None:
        """Forget the gradients."""

    def share(self) -> None:
        """Take the parts to the weights of all ranks."""


class _Zero2:
    """Stages 1 and 2: the parts of all parameters stand in one row, of which each has a piece."""

    def __init__(self, zero: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self.zero = zero
        self.parameters: Mapping[str, Any] = parameters

    def part(self, name: str) -> tuple[int, Tensor]:
        parameter = self.parameters[name]
        if not self.divides(name):
            return 0, parameter.detach().view(-1)
        mapping = parameter._hp_mapping
        if mapping is None:  # it is in other ranks
            return 0, self.zero.single_partition_of_fp32_groups[0].detach()[:0]
        return mapping.lp_fragment_address.start, mapping.hp_fragment.detach()

    def divides(self, name: str) -> bool:
        return bool(self.parameters[name].requires_grad)

    def gradients(self) -> dict[str, Tensor]:
        if self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()
        gradients = {}
        for name, parameter in self.parameters.items():
            if self.divides(name) and (mapping := parameter._hp_mapping) is not None:
                gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
                gradients[name] = gradient.view(-1)
        return gradients

    def end_step(self) -> None:
        zero = self.zero
        zero.micro_step_id = -1
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        else:
            zero.averaged_gradients.clear()
            zero.all_grad_tensors.clear()

    def share(self) -> None:
        self.zero.update_lp_params()


class _Zero3:
    """Stage 3: each parameter is divided into as many equal pieces as there are ranks."""

    def __init__(self, zero: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self.zero = zero
        self.parameters: Mapping[str, Any] = parameters

    def part(self, name: str) -> tuple[int, Tensor]:
        parameter = self.parameters[name]
        size = parameter.partition_numel()
        start = min(size * self.zero._get_param_partition_rank(parameter), parameter.ds_numel)
        if parameter.requires_grad:
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            stored = self.zero.fp32_partitioned_groups_flat[group].detach()[offset:]
        else:
            stored = parameter.ds_tensor.detach().view(-1)
        return start, stored[: min(size, parameter.ds_numel - start)]

    def divides(self, name: str) -> bool:
        return True

    def gradients(self) -> dict[str, Tensor]:
        pieces = self.zero.get_fp32_grad_partitions()
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        gradients = {}
        for group, members in enumerate(self.zero.fp16_groups):
            for index, parameter in enumerate(members):
                name = names[id(parameter)]
                _, part = self.part(name)  # the last rank's piece is filled up
                gradients[name] = pieces[group][index].view(-1)[: part.numel()]
        return gradients

    def end_step(self) -> None:
        self.zero._pre_step()
        self.zero.zero_grad(set_to_none=True)
        if self.zero.offload_optimizer:
            self.zero.reset_cpu_buffers()
        else:
            self.zero.averaged_gradients = {}

    def share(self) -> None:
        self.zero._partition_all_parameters()  # nobody keeps a weight of before
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self.zero.persistent_parameters:
            persistent[0].all_gather(persistent)


def _initialized(
    model: nn.Module, config: dict[str, Any], device: torch.device, ranks: Ranks
) -> Any:
    """DeepSpeed's engine round a model, in the process group that there is."""
    deepspeed = _library(device, ranks.local_rank)
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is None:  # what it makes itself waits half an hour for a lost rank
        groups._WORLD_GROUP = ranks.new_group()
    # Its row of parameters is all that DeepSpeed takes of an optimizer here.
    stand_in = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)
    # It loads nothing here; if a version did, no pickle would execute.
    with _environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=stand_in, config=config, dist_init_required=False
        )
    return engine


def _library(device: torch.device, local_rank: int) -> Any:
    """DeepSpeed, on the run's kind of device, with its words in our log and no kernels to build."""
    os.environ |= {"DS_ACCELERATOR": device.type, "LOCAL_RANK": str(local_rank)}
    import deepspeed
    from deepspeed import ops
    from deepspeed.runtime import compiler
    from deepspeed.utils.logging import logger as its_logger

    ops.__compatible_ops__ = {}  # kernels that could be built: to find them a compiler is run
    compiler.compile = lambda: lambda function: function  # its Muon would be: that takes seconds
    # It calls functions that torch 2.14 has under other names, which are not there before.
    warnings.filterwarnings("ignore", ".*(all_gather|reduce_scatter)_single", FutureWarning)
    its_logger.handlers.clear()  # its own writes to stdout
    its_logger.parent = logger
    its_logger.disabled = False
    its_logger.propagate = True
    return deepspeed


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables of the environment in a block, put back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
