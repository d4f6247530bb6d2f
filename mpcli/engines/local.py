"""One process, one device, eager PyTorch (or its compiler)."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mpcli.checkpoint import outline
from mpcli.data.batch import Batch
from mpcli.data.seeds import rank_seed
from mpcli.engines.base import LossFunction, Outcome
from mpcli.optim import build_optimizer, weights_apart
from mpcli.optim.half_storage import HalfStorageStep
from mpcli.optim.schedule import learning_rate_table
from mpcli.precision.clipping import clip_
from mpcli.precision.convert import convert
from mpcli.precision.numerics import Numerics, autocast, numerics
from mpcli.precision.observe import TypesObserver, observed_types
from mpcli.precision.probe import ActivationHooks, parameter_key
from mpcli.precision.scaler import LossScaler
from mpcli.precision.sensitive import last_layer
from mpcli.precision.statistics import Key, Samples
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.train import Clip, ClipAgc
from mpcli.records import ModuleTypes

logger = logging.getLogger(__name__)

_NOTHING = contextlib.nullcontext()


def mode_problems(meaning: Numerics) -> list[str]:
    """Why this engine cannot honour a precision mode: it honours every one."""
    return []


class LocalEngine:
    """The transactional step: a step with a non-finite gradient changes nothing but the scale.

    `applied` counts applied steps on the device; the learning rate is `table[applied]`.

    Attributes:
        parameters: of the model, as stored.
        masters: what the optimizer steps: fp32 copies of half parameters in the master modes, the
            parameters themselves otherwise.
        observed: the types that the first micro-batch was computed in; None before it.
        names: of the parameters, as the model calls them.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        device: torch.device,
        steps: int,
        fp32_modules: Collection[str] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        meaning = numerics(recipe.precision.mode)
        self.device = device
        self.ranks = ranks
        self.model = model
        self.forward_model = model  # what computes the loss: the model, or what is wrapped round it
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.home = device  # of what is stepped, and of all that decides about the step
        self.library_config: dict[str, Any] | None = None
        self.parameters: list[Tensor]
        self.masters: list[Tensor]
        self.frozen: dict[str, Tensor]
        self._take_over(recipe, meaning, fp32_modules)
        self.copied = [
            (p, master)
            for p, master in zip(self.parameters, self.masters, strict=True)
            if p is not master
        ]
        self.clip = recipe.train.clip
        self.unclipped: set[Tensor] = set()
        if isinstance(self.clip, ClipAgc):  # Brock et al. 2021 leave the last layer alone
            last = set(model.get_submodule(last_layer(model)).parameters(recurse=False))
            pairs = zip(self.parameters, self.masters, strict=True)
            self.unclipped = {master for p, master in pairs if p in last}
        self.scaler = LossScaler(recipe.precision.loss_scale, self.home)
        self.learning_rates = learning_rate_table(recipe.optim, steps, self.home)
        self.applied = torch.zeros(1, dtype=torch.int64, device=self.home)
        self.lr = torch.tensor([0.0], dtype=torch.float32, device=self.home)
        named = list(zip(self.names, self.masters, strict=True))
        apart = weights_apart(recipe.optim, model)
        self.optimizer = build_optimizer(recipe.optim, named, self.lr.view(()), apart)
        self.half_storage: HalfStorageStep | None = None
        if meaning.half_weights and not meaning.masters:
            seed = recipe.train.seed if recipe.precision.stochastic_rounding else None
            self.half_storage = HalfStorageStep(self.optimizer, self.masters, seed)
        self.autocast = autocast(meaning, device)
        # BatchNorm's statistics change in forward, before anyone knows that the step overflows.
        self.buffers = list(model.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.seed = recipe.train.seed
        self.ema = recipe.train.ema
        self.average = [torch.zeros_like(m, dtype=torch.float32) for m in self.masters if self.ema]
        self.compile = recipe.engine.compile
        self.observed: dict[str, ModuleTypes] | None = None
        self._observe = True
        self.samples = Samples(device, through_fp16=meaning.compute == torch.float16)
        self._sampling = False
        self._hooks: ActivationHooks | None = None  # of the next micro-batch
        self._losses: list[Tensor] = []  # of the step's micro-batches

    def _take_over(self, recipe: Recipe, meaning: Numerics, fp32_modules: Collection[str]) -> None:
        """Convert the model; find what of it is stored, stepped and frozen, and where."""
        model = self.model
        self.parameters = [model.get_parameter(name) for name in self.names]
        exact = [p.data for p in self.parameters]
        frozen = {name: p.data for name, p in model.named_parameters() if not p.requires_grad}
        convert(model, meaning, self.device, fp32_modules)
        self.masters = [
            p if p.dtype == torch.float32 or not meaning.masters else master
            for p, master in zip(self.parameters, exact, strict=True)
        ]
        # What does not learn is rounded for the products only: it is saved as it came.
        self.frozen = {
            name: value
            for name, value in frozen.items()
            if meaning.masters and model.get_parameter(name).dtype != value.dtype
        }

    def sample(self, shadow: Mapping[Key, Tensor] | None = None) -> None:
        """Look at the tensors of the coming step: activations are of its first micro-batch."""
        self._sampling = True
        self.samples.begin(self._scale(), shadow)
        self._hooks = ActivationHooks(self.model, self.samples)

    def accumulate(
        self, loss_function: LossFunction, batch: Batch, total_weight: int, *, last: bool
    ) -> Tensor:
        """Forward and backward of one micro-batch; gradients add up as the mode says."""
        observer = TypesObserver(self.model) if self._observe else None
        hooks, self._hooks = self._hooks, None
        # What is compiled runs no hooks.
        eager = torch.compiler.set_stance("force_eager") if hooks and self.compile else _NOTHING
        with self._synchronising(last):
            with observer or _NOTHING, hooks or _NOTHING, eager, self.autocast:
                loss_sum, _ = loss_function(self.forward_model, batch)
            # The gradient of the sum is scale / weight: the backward of (sum / weight) * scale.
            loss_sum.backward(self._scale() / total_weight)
        if observer:
            self._observe = False
            self._observed(observer)
            if self.compile:  # what is compiled cannot be observed
                self._compile()
        if self.copied:
            self._add_to_masters()
        self._losses.append(loss_sum.detach() / total_weight)
        return self._losses[-1]

    def _synchronising(self, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward: gradients are added over the ranks in the last ones."""
        return _NOTHING

    def _scale(self) -> Tensor:
        """The loss scale where the loss is; nobody waits for it."""
        return self.scaler.scale.to(self.device, non_blocking=True)

    def _observed(self, observer: TypesObserver) -> None:
        self.observed = observed_types(self.model, observer)

    def _compile(self) -> None:
        self.model.compile(dynamic=False)  # dynamic shapes fail with recomputed blocks

    def _add_to_masters(self) -> None:
        """Add the micro-batch's half gradients to the masters' fp32 ones."""
        for parameter, master in self.copied:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def step(self) -> Outcome:
        """Unscale, check, clip, update or skip, advance loss scale and averages."""
        sampling, self._sampling = self._sampling, False
        if sampling:
            self._sample_weights_and_gradients()
            before = [master.detach().clone() for master in self.masters]
        gradients = self._gradients()
        present = [gradient for gradient in gradients if gradient is not None]
        found_inf = self.scaler.unscale_(present)
        grad_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)))
        losses, self._losses = self._losses, []
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        loss, grad_norm, found_inf = self._over_ranks(loss, grad_norm, found_inf)
        if self.clip is not None:
            self._clip(self.clip, gradients, grad_norm)

        torch.index_select(self.learning_rates, 0, self.applied, out=self.lr)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # a fused kernel reads it
        self._update(gradients)
        self.applied += found_inf.logical_not()
        self._keep_or_restore_buffers(found_inf)
        if self.ema:
            self._move_average(self.ema, found_inf)

        layers = None
        if sampling:
            self._sample_updates(before, gradients)
            layers = self.samples.finish(found_inf)
        outcome = Outcome(loss, grad_norm, self.scaler.scale, found_inf, layers)
        self.scaler.update(found_inf)
        return outcome

    def _over_ranks(
        self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same three numbers, of all ranks together."""
        return loss, grad_norm, found_inf

    def _sample_weights_and_gradients(self) -> None:
        for name, master in zip(self.names, self.masters, strict=True):
            self.samples.add(self._whole(name, master), parameter_key(name, "weight"))
            if master.grad is not None:
                gradient = self._whole(name, master.grad)
                self.samples.add(gradient, parameter_key(name, "grad"), scaled=True)

    def _sample_updates(self, before: list[Tensor], gradients: list[Tensor | None]) -> None:
        stepped = zip(self.names, before, self.masters, gradients, strict=True)
        for name, old, master, gradient in stepped:
            old, master = self._whole(name, old), self._whole(name, master)
            gradient = None if gradient is None else self._whole(name, gradient)
            self.samples.add_update(parameter_key(name, "update"), old, master, gradient)

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """A parameter, or what has its shape, of which this rank has a part. All ranks call it."""
        return part

    def _gradients(self) -> list[Tensor | None]:
        """fp32, still scaled, one per master; None where the loss does not depend on it."""
        gradients = [master.grad for master in self.masters]
        if self.half_storage:
            gradients = [None if gradient is None else gradient.float() for gradient in gradients]
            for master in self.masters:
                master.grad = None
        return gradients

    def _clip(self, clip: Clip, gradients: list[Tensor | None], grad_norm: Tensor) -> None:
        clipped = [
            (gradient, master)
            for gradient, master in zip(gradients, self.masters, strict=True)
            if gradient is not None and master not in self.unclipped
        ]
        clip_(clip, [g for g, _ in clipped], [m for _, m in clipped], grad_norm)

    @torch.no_grad()
    def _update(self, gradients: list[Tensor | None]) -> None:
        if self.half_storage:
            self.half_storage.step(gradients, self.applied)
            return
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        for parameter, master in self.copied:
            parameter.copy_(master)

    def _keep_or_restore_buffers(self, found_inf: Tensor) -> None:
        if not self.buffers:
            return
        skipped = found_inf.to(self.device) > 0
        for buffer, before in zip(self.buffers, self.buffers_before, strict=True):
            torch.where(skipped, before, buffer, out=before)
        torch._foreach_copy_(self.buffers, self.buffers_before)

    @torch.no_grad()
    def _move_average(self, decay: float, found_inf: Tensor) -> None:
        share = (1.0 - decay) * (1.0 - found_inf)
        apart = torch._foreach_sub([master.float() for master in self.masters], self.average)
        torch._foreach_add_(self.average, torch._foreach_mul(apart, share))

    def _averages(self) -> list[Tensor] | None:
        """The averaged weights in fp32; None without `train.ema`, or before an applied step.

        The average begins at zero and is divided by 1 - decay^applied, as Adam's moments are
        (Kingma & Ba 2015, section 3): a mean of the weights after each step, to which the random
        initial weights do not belong.
        """
        applied = self.applied.item() if self.ema else 0
        if not self.ema or not applied:
            return None
        return list(torch._foreach_div(self.average, 1.0 - self.ema**applied))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model under autocast, with its averaged weights when there are any."""
        with torch.no_grad(), self.autocast:
            averages = self._averages()
            trained = [p.clone() for p in self.parameters] if averages else []
            if averages:
                torch._foreach_copy_(self.parameters, averages)
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train()
                if trained:
                    torch._foreach_copy_(self.parameters, trained)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step follows from, bit for bit: tensors, and numbers for JSON."""
        random: dict[str, Tensor] = {}
        for rank, states in enumerate(self.ranks.gathered(self.random_state())):
            random |= {_random_key(name, rank): state for name, state in states.items()}
        return {**self._state(), **random}, {"attempted": self.scaler.attempted}

    def random_state(self) -> dict[str, Tensor]:
        """Of the generators that a forward draws from, by device."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Become what `checkpoint` was taken of, on this device or another."""
        own = self._state()
        given = {name for name in tensors if not name.startswith("rng.")}
        if different := sorted(own.keys() ^ given):
            name = different[0]
            raise foreign(f"`{name}` is {'missing' if name in own else 'unknown'}")
        for name, value in own.items():
            there = self._part_here(name, outline(tensors, name))
            if (value.shape, value.dtype) != (there.shape, there.dtype):
                raise foreign(f"`{name}` is {_about(there)}, and {_about(value)} here")
        attempted, applied = state.get("attempted"), int(tensors["applied"])
        if type(attempted) is not int or not 0 <= applied <= attempted:
            raise foreign(f"{applied} of {attempted} steps are applied")
        for name in own:
            if name.startswith("optimizer.step.") and not 0 <= tensors[name].item() <= applied:
                raise foreign(f"`{name}` is {tensors[name].item()} after {applied} steps")

        scaler = {name: f"scaler.{name}" for name in self.scaler.tensors()}
        self.scaler.restore({name: tensors[key] for name, key in scaler.items()}, attempted)
        for name in own.keys() - {*scaler.values()}:
            # Into its memory format. Read one by one: all may be more than memory holds.
            own[name].copy_(self._part_here(name, tensors[name]))
        self._go_on(tensors, attempted)

    def _part_here(self, key: str, whole: Tensor) -> Tensor:
        """Of a tensor in a checkpoint what this rank has."""
        return whole

    def adopt(self, tensors: Mapping[str, Tensor], attempted: int) -> None:
        """Go on from a checkpoint of another mode or optimizer, as nearly as this one can.

        Weights are the exact ones, so the masters of a mode that has any, rounded once to the types
        here. An optimizer's state of a weight goes over where it is of the same names and shapes.
        What is not given begins as the recipe says, such as a loss scale.

        Args:
            tensors: of `checkpoint`; without `scaler.*` for another policy.
            attempted: steps so far.

        Raises:
            UserError: exit 4, a weight or a buffer is missing, or of another shape.
        """
        own = self._state()
        fresh = {  # weights whose state is of another optimizer
            _weight_of(name)
            for name in own.keys() | tensors.keys()
            if name.startswith("optimizer.")
            and (name not in own or name not in tensors or own[name].shape != tensors[name].shape)
        }
        for name, value in own.items():
            part, _, bare = name.partition(".")
            if part == "optimizer" and _weight_of(name) in fresh:
                continue
            is_weight = part in ("model", "master")
            exact = f"master.{bare}" if f"master.{bare}" in tensors else f"model.{bare}"
            given = tensors.get(exact if is_weight else name)
            if part != "scaler" and given is not None and given.shape == value.shape:
                value.copy_(given)
            elif is_weight or part == "buffer":
                there = "missing" if given is None else _about(given)
                raise foreign(f"`{name}` is {there}, and {_about(value)} here")
        if int(self.applied) > attempted:
            raise foreign(f"{int(self.applied)} of {attempted} steps are applied")
        scaler = {name: f"scaler.{name}" for name in self.scaler.tensors()}
        if all(key in tensors for key in scaler.values()):
            self.scaler.restore({name: tensors[key] for name, key in scaler.items()}, attempted)
        else:
            self.scaler.begin(attempted)
        self._go_on(tensors, attempted)

    def _go_on(self, tensors: Mapping[str, Tensor], attempted: int) -> None:
        """What follows from a state that was copied, and its random numbers."""
        for before, buffer in zip(self.buffers_before, self.buffers, strict=True):
            before.copy_(buffer)
        cpu, cuda = (_random_key(name, self.ranks.rank) for name in ("cpu", "cuda"))
        if self.ranks.rank and cpu not in tensors:  # saved by fewer ranks than there are now
            torch.manual_seed(rank_seed(self.seed, self.ranks.rank, attempted))
        else:
            try:
                torch.set_rng_state(tensors[cpu])
                if self.device.type == "cuda" and cuda in tensors:
                    torch.cuda.set_rng_state(tensors[cuda], self.device)
            except (KeyError, RuntimeError, TypeError) as error:
                raise foreign("it lacks a state of random numbers") from error
        if self.compile and self._observe and attempted:  # step 1 alone is not compiled
            self._observe = False
            self._compile()

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that outlives a step, by a name that says what it is of."""
        state: dict[str, Tensor] = {}
        state |= {f"model.{name}": value for name, value in self.model.named_parameters()}
        state |= {f"buffer.{name}": value for name, value in self.model.named_buffers()}
        stepped = zip(self.names, self.parameters, self.masters, strict=True)
        for name, parameter, master in stepped:
            if master is not parameter:
                state[f"master.{name}"] = master
            for key, value in self.optimizer.state.get(master, {}).items():
                state[f"optimizer.{key}.{name}"] = value
        state |= {f"master.{name}": value for name, value in self.frozen.items()}
        if self.ema:
            averages = zip(self.names, self.average, strict=True)
            state |= {f"average.{name}": value for name, value in averages}
        state |= {f"scaler.{name}": value for name, value in self.scaler.tensors().items()}
        state["applied"] = self.applied
        return {name: value.detach() for name, value in state.items()}

    def weights(self) -> dict[str, Tensor]:
        """The exact weights and the buffers that the next forward has, by name: no averages."""
        weights = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        weights |= dict(zip(self.names, self.masters, strict=True)) | self.frozen
        return {name: value.detach() for name, value in weights.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The model's weights and buffers: averages or masters in fp32 where there are any."""
        weights = self._averages() or self.masters
        exact = dict(zip(self.parameters, weights, strict=True))
        exact |= {self.model.get_parameter(name): value for name, value in self.frozen.items()}
        state = self.model.state_dict(keep_vars=True)
        return {name: exact.get(value, value).detach() for name, value in state.items()}

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


def checkpoint_weights(tensors: Mapping[str, Tensor], decay: float | None) -> dict[str, Tensor]:
    """The weights to evaluate and the buffers, by their names in the model.

    Args:
        tensors: of a checkpoint.
        decay: `train.ema`.
    """
    keys: dict[str, dict[str, str]] = {}
    for key in tensors:
        part, _, name = key.partition(".")
        keys.setdefault(part, {})[name] = key
    applied = int(tensors["applied"])
    averages = keys.get("average", {}) if decay and applied else {}
    exact = keys["model"] | keys.get("buffer", {}) | keys.get("master", {}) | averages
    weight = 1.0 - (decay or 0.0) ** applied  # of an average
    return {
        name: tensors[key] / weight if name in averages else tensors[key]
        for name, key in exact.items()
    }


def foreign(what: str) -> UserError:
    """Why a checkpoint does not fit an engine."""
    return user_error(
        f"it is not of this run: {what}",
        "a checkpoint fits only the recipe that it was saved with",
        exit_code=Exit.CHECKPOINT,
    )


def _weight_of(key: str) -> str:
    """Whose a tensor of the optimizer's state is: `optimizer.<key>.<weight>`."""
    return key.split(".", 2)[2]


def _random_key(name: str, rank: int) -> str:
    """Of a rank's random state in a checkpoint; rank 0's has the name that a single process has."""
    return f"rng.{name}.{rank}" if rank else f"rng.{name}"


def _about(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


PAGE = resource.getpagesize()


@functools.cache
def _statm(process: int) -> int | None:
    """Descriptor of the process's memory counters, open for good: they are read every step."""
    try:
        return os.open(f"/proc/{process}/statm", os.O_RDONLY)
    except OSError:  # not Linux
        return None
