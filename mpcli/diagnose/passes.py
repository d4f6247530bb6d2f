"""One forward and backward, followed module by module, and its comparison with another one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.engines.base import LossFunction
from mpcli.precision.observe import LOSS
from mpcli.precision.operations import AttentionSeen, Call, OperationsSeen
from mpcli.precision.tape import RandomTape
from mpcli.precision.trace import Kept, ModuleTrace, kept_values
from mpcli.records import (
    NonFiniteOrigin,
    Parting,
    ReplayedAttention,
    ReplayedModule,
    ShadowComparison,
)

GAIN = 16.0
"""A sound module may make the L2 norm of what it was given this many times as large."""
JUMP = 4.0
"""A sound module may make a relative difference this many times as large."""
ROUNDING = {"fp32": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of rounding a normal number, by `Numerics.compute_name`."""


class Moment:
    """What a forward follows from besides weights and batch: buffers, and random numbers.

    A buffer that was made or has grown since (a table of positions, a mask) is a cache, which says
    the same however large it is. It stays, for the model may remember its size elsewhere; and a
    model that has none yet makes it itself.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._random = torch.get_rng_state()
        if device.type == "cuda":
            self._cuda_random = torch.cuda.get_rng_state(device)

    @torch.no_grad()
    def give(self, model: nn.Module) -> None:
        """Bring a model with these buffers (of any type), and torch, back to it."""
        for name, buffer in model.named_buffers():
            before = self._buffers.get(name)
            if before is not None and before.shape == buffer.shape:
                buffer.copy_(before)
        torch.set_rng_state(self._random)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._cuda_random, self._device)


@dataclass(frozen=True)
class Pass:
    """What a forward and backward gave.

    Attributes:
        loss: the micro-batch's share of the step's loss.
        scale: that gradients are multiplied by.
        kept: by module and call, in the order of returning.
        parameters: gradients of the parameters by their names, fp32, sampled as `kept`.
        half: as `OperationsSeen` has it.
        attention: the same, where it was asked for.
    """

    loss: float
    scale: float
    origin: NonFiniteOrigin | None
    kept: dict[Call, Kept]
    parameters: dict[str, Tensor]
    half: dict[str, set[str]] = field(default_factory=dict)
    attention: dict[Call, AttentionSeen] = field(default_factory=dict)


def follow(
    model: nn.Module,
    loss_function: LossFunction,
    batch: Batch,
    total_weight: int,
    scale: float,
    region: AbstractContextManager[object],
    tape: RandomTape,
    *,
    attention: bool = False,
) -> Pass:
    """Forward and backward of one micro-batch; no gradient stays behind.

    Args:
        total_weight: of the global batch.
        scale: of the loss.
        region: in which the forward runs.
        tape: of the random numbers.
        attention: look at its logits too.
    """
    seen = OperationsSeen(attention=attention)
    with tape, ModuleTrace(model, keep=True, listen=seen) as trace:
        with region:
            loss_sum, _ = loss_function(model, batch)
        trace.watch(loss_sum)
        loss_sum.backward(torch.tensor(scale, device=loss_sum.device) / total_weight)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = kept_values(parameter.grad)
            parameter.grad = None
    loss = float(loss_sum.detach() / total_weight)
    return Pass(loss, scale, trace.origin, trace.kept, gradients, seen.half, seen.attention)


@dataclass(frozen=True)
class Difference:
    """Tensors beside their shadows.

    Attributes:
        seen: what is told of them.
        size: L2 norm of the difference.
        norm: of the shadow.
        elements: how many are finite in the shadow.
    """

    seen: ShadowComparison
    size: float
    norm: float
    elements: int


@dataclass(frozen=True)
class ComparedCall:
    """A call of a module beside the same call in fp32; None where there is nothing to compare."""

    inputs: Difference | None
    outputs: Difference | None
    gradients: Difference | None  # of the outputs
    input_gradients: Difference | None
    parameters: Difference | None  # gradients of its own ones


def compared(model: nn.Module, half: Pass, fp32: Pass) -> dict[Call, ComparedCall]:
    """Every call that both passes have, in the order of returning."""
    calls = {}
    for call, kept in half.kept.items():
        if exact := fp32.kept.get(call):
            own = _own_gradients(model, call[0], half)
            calls[call] = ComparedCall(
                _beside(_numbered(kept.inputs), _numbered(exact.inputs)),
                _beside(_numbered(kept.outputs), _numbered(exact.outputs)),
                _beside(kept.gradients, exact.gradients, half.scale),
                _beside(kept.input_gradients, exact.input_gradients, half.scale),
                _beside(own, fp32.parameters, half.scale),
            )
    return calls


def compare(found: Tensor, exact: Tensor) -> Difference:
    """A tensor beside its shadow, both of one shape.

    Elements that are not finite in the shadow do not count; one that is not finite in `found`
    alone makes the error infinite.
    """
    finite = exact.isfinite()
    found, exact = found[finite].double(), exact[finite].double()
    overflowed = int((~found.isfinite()).sum())
    size = math.inf if overflowed else float((found - exact).norm())
    norm = float(exact.norm())
    elements = max(exact.numel(), 1)
    seen = ShadowComparison(
        flushed=int(((found == 0) & (exact != 0)).sum()) / elements,
        overflowed=overflowed / elements,
        error=size / norm if norm else math.inf if size else 0.0,
    )
    return Difference(seen, size, norm, exact.numel())


def module_rows(
    model: nn.Module,
    run: Pass,
    fp32: Pass,
    beside_fp32: dict[Call, ComparedCall],
    bf16_beside_fp32: dict[Call, ComparedCall],
) -> list[ReplayedModule]:
    """The table of a replay, from two passes and what `compared` found."""
    rows = []
    for (name, number), call in beside_fp32.items():
        kept, exact = run.kept[name, number], fp32.kept[name, number]
        half = bf16_beside_fp32.get((name, number))
        rows.append(
            ReplayedModule(
                module=name,
                call=number,
                type=type(model.get_submodule(name)).__name__,
                output=_seen(call.outputs),
                output_max=_largest(kept.outputs),
                exact_output_max=_largest(exact.outputs),
                grad_output=_seen(call.gradients),
                grad_output_max=_largest(kept.gradients.values(), run.scale),
                exact_grad_max=_largest(
                    [*exact.gradients.values(), *_own_gradients(model, name, fp32).values()]
                ),
                parameter_grad=_seen(call.parameters),
                fp32_parameter_grad_rms=_rms(call.parameters),
                bf16_output=_seen(half.outputs) if half else None,
                bf16_grad_output=_seen(half.gradients) if half else None,
                half_operations=tuple(sorted(run.half.get(name, ()))),
            )
        )
    return rows


def attention_rows(fp32: Pass) -> Iterator[ReplayedAttention]:
    """Every attention of a pass that looked for them, in order."""
    for (name, number), seen in fp32.attention.items():
        yield ReplayedAttention(
            module=name,
            call=number,
            product_max=seen.product_max,
            logit_max=seen.logit_max,
            entropy=seen.entropy,
            saturated=seen.saturated,
        )


def parting(calls: dict[Call, ComparedCall], compute: str) -> Parting | None:
    """Where two precisions part; rather nowhere than in a module that is sound.

    A tensor is off where its relative difference from fp32 is above 0.25, in bf16 above 0.5:
    rounding moves gradients by much more than one rounding does, where ReLUs near 0 open or close
    (in sound conv nets by 0.04 in fp16, and by 0.2 in bf16).

    Forward: the first module to return an output that is off, when its inputs are not. Backward,
    where none parts forward: the first one, in the order of backward, the gradient of whose output
    is not off, when that of its inputs or of its own parameters is; of a module and one inside it,
    the inner one. It is the loss where the gradient of the model's output overflowed, or is off
    with as large a share of it flushed: a loss near its minimum magnifies what its inputs lack.

    What a module was given, or the rounding of it, is no fault of the module: it is not named
    where the norm of its difference is at most `GAIN` times that of what it was given (of the
    rounding, if that is larger), or the relative difference at most `JUMP` times as large. So a
    difference of nearly equal tensors, which is nothing but rounding, is not blamed, nor the layer
    in which what many layers add up crosses the limit, nor what holds such a module. The gradient
    of a weight is a sum of products with the inputs, and of a bias a plain sum, which cancel more
    the better a model has learnt: their bound is of that by Cauchy and Schwarz.

    Args:
        compute: the number format of the run's products, as `ROUNDING` has it.
    """
    rounding = ROUNDING[compute]
    limit = 0.5 if compute == "bf16" else 0.25
    sound: list[str] = []  # modules whose results are off, for which they are not to blame
    for (name, number), call in calls.items():
        if _error(call.outputs) > limit >= _error(call.inputs):
            if any(is_inside(inner, name) for inner in sound):
                continue
            if _exceeds(call.outputs, call.inputs, rounding):
                error = _error(call.outputs)
                return Parting(module=name, call=number, phase="forward", error=error)
            sound.append(name)
    whole = next((call.gradients for (name, _), call in calls.items() if not name), None)
    if whole and whole.seen.error > limit:
        if whole.seen.overflowed or whole.seen.flushed > limit:
            return Parting(module=LOSS, call=0, phase="backward", error=whole.seen.error)
        return None
    # Infinite gradients that reach no weight (a ReLU sets those of dead channels to 0) do no harm.
    reaches = any(math.isinf(_error(call.parameters)) for call in calls.values())
    parted: dict[Call, float] = {}
    for place, call in reversed(calls.items()):
        if call.gradients and call.gradients.seen.error <= limit:
            inputs = call.inputs.norm if call.inputs else 0.0
            terms = max(1.0, inputs, math.sqrt(call.gradients.elements))
            known = max(_error(call.inputs), _error(call.outputs))
            for made, scale in ((call.input_gradients, 1.0), (call.parameters, terms)):
                if _error(made) > limit and (reaches or math.isfinite(_error(made))):
                    if _exceeds(made, call.gradients, rounding, scale, known):
                        parted[place] = max(parted.get(place, 0.0), _error(made))
                    else:
                        sound.append(place[0])
    for (name, number), error in parted.items():
        inner = [*(other for other, _ in parted), *sound]
        if not any(other != name and is_inside(other, name) for other in inner):
            return Parting(module=name, call=number, phase="backward", error=error)
    return None


def _exceeds(
    made: Difference | None,
    given: Difference | None,
    rounding: float,
    scale: float = 1.0,
    known: float = 0.0,
) -> bool:
    """Whether a difference is more than what was given, or its rounding, explains.

    Args:
        scale: that the norm of what is given is multiplied by.
        known: relative difference of what else the result is computed from.
    """
    if made is None or given is None:
        return made is not None
    noise = GAIN * scale * max(given.size, rounding * given.norm)
    return made.size > noise and made.seen.error > JUMP * max(given.seen.error, known, rounding)


def differing(model: nn.Module, one: Pass, two: Pass) -> list[str]:
    """Modules whose outputs, gradients of outputs or own parameters' gradients differ in a bit.

    Those whose outputs do come first, in the order of forward: what follows from them is behind.
    """
    forward, backward = [], []
    for call, kept in one.kept.items():
        other = two.kept.get(call, Kept([], []))
        own = [_own_gradients(model, call[0], each) for each in (one, two)]
        if not _same_bits(_numbered(kept.outputs), _numbered(other.outputs)):
            forward.append(call[0])
        elif not _same_bits(kept.gradients, other.gradients) or not _same_bits(*own):
            backward.append(call[0])
    return list(dict.fromkeys([*forward, *reversed(backward)]))


def is_inside(name: str, outer: str) -> bool:
    """Whether a module is another one, or in it."""
    return not outer or name == outer or name.startswith(f"{outer}.")


def _own_gradients(model: nn.Module, name: str, one: Pass) -> dict[Any, Tensor]:
    """Of the parameters that a module has itself."""
    own = model.get_submodule(name).named_parameters(name, recurse=False)
    return {full: one.parameters[full] for full, _ in own if full in one.parameters}


def _numbered(tensors: Iterable[Tensor]) -> dict[Any, Tensor]:
    return dict(enumerate(tensors))


def _beside(
    found: Mapping[Any, Tensor], exact: Mapping[Any, Tensor], scale: float = 1.0
) -> Difference | None:
    common = [key for key in found if key in exact and found[key].shape == exact[key].shape]
    if not common:
        return None
    values = torch.cat([found[key] for key in common])
    return compare(values.double() / scale, torch.cat([exact[key] for key in common]))


def _same_bits(one: Mapping[Any, Tensor], two: Mapping[Any, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[key].view(torch.int32), two[key].view(torch.int32)) for key in one
    )


def _seen(difference: Difference | None) -> ShadowComparison | None:
    return difference.seen if difference else None


def _rms(difference: Difference | None) -> float | None:
    """Of the shadow."""
    return difference.norm / math.sqrt(max(difference.elements, 1)) if difference else None


def _error(difference: Difference | None) -> float:
    return difference.seen.error if difference else 0.0


def _largest(tensors: Iterable[Tensor], scale: float = 1.0) -> float | None:
    sizes = [
        float(tensor.abs().nan_to_num(0.0, posinf=math.inf).max())
        for tensor in tensors
        if tensor.numel()
    ]
    return max(sizes) / scale if sizes else None
