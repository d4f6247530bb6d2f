"""What a recipe alone shows to be possible but unsafe: warnings of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import assert_never

import torch

from mpcli.machine import Machine
from mpcli.plan.precision import PrecisionPlan, has_batch_norm
from mpcli.precision.formats import dtype_name
from mpcli.precision.numerics import Numerics, numerics
from mpcli.recipe.engine import Ddp, Engine, Fsdp2
from mpcli.recipe.errors import Problem
from mpcli.recipe.optim import Adam, AdamW, AdamW8bit, Muon
from mpcli.recipe.precision import DynamicScale, LossScale, NoScale, ScheduledScale, StaticScale
from mpcli.recipe.recipe import Recipe

LARGE_SCALE = 2.0**24
"""Above this even gradients of 2^-8 leave fp16's range (65504)."""
OFTEN = 0.1
"""Share of steps that a dynamic scale skips once it has found its level: a growth too far, then a
back-off. torch's own settings give 1 in 2,001."""
DEEP_BACKOFF = 2.0**-6
"""A back-off that takes more than 6 of the scale's bits at once: an overflow says that 1 is too
many."""
FP16_SAFE_EPS = 1e-4
"""About the root of 2^-25, below which a second moment is zero in fp16."""
FP32_SAFE_EPS = 2.0**-75
"""About the root of 2^-149, the smallest number of fp32."""
LARGE_EPS = 1.0
"""Gradients of a mean loss are below it nearly everywhere."""
ADAM_LARGEST_LR = 1.0
SGD_LARGEST_LR = 1000.0
LEAST_MOVE = 1e-6
"""Of weights of about 1e-2: a hundredth of a percent."""
FEW_SAMPLES = 2
"""ResNet-50 errs by 34.7% instead of 23.6% with BatchNorm over 2 images (Wu & He 2018, table 2)."""


def _warning(finding: str | None, path: str, what: str, hint: str) -> Problem:
    return Problem(what, hint, path=path, severity="warning", finding=finding)


def dangers(
    recipe: Recipe,
    machine: Machine,
    device: torch.device,
    precision: PrecisionPlan | None,
    steps: int,
    world_size: int,
    micro_batch: int,
) -> Iterator[Problem]:
    """Warnings, each with the id of the finding that it would become.

    Args:
        precision: None where the model cannot be planned: others are warned of nevertheless.
        steps: of the run.
        micro_batch: samples per forward and process.
    """
    meaning, loss_scale = numerics(recipe.precision.mode), recipe.precision.loss_scale
    half = meaning.compute_name
    if half in machine.emulated.get(device.type, frozenset()):
        yield _warning(
            None,
            "precision.mode",
            f"this {device.type} has no {half} instructions: exact, but slow",
            "`mptrain env` shows how slow",
        )
    if half == "fp16":
        yield from _fp16_scale_warnings(loss_scale)
        if isinstance(loss_scale, DynamicScale):
            yield from _dynamic_scale_warnings(loss_scale)
    elif not isinstance(loss_scale, NoScale):
        yield _warning(
            None,
            "precision.loss_scale",
            f"{meaning.mode} needs no loss scale: small gradients are within its range",
            "use `loss_scale: {kind: none}`",
        )
    if meaning.half_weights and not meaning.masters:
        yield from _pure_warnings(recipe, half, precision.half_norms if precision else 0)
    yield from _update_warnings(recipe, steps)
    yield from _reduction_warnings(recipe.engine, meaning)
    if precision:
        yield from _batchnorm_warnings(recipe, device, precision, world_size, micro_batch)
    each = recipe.engine.processes
    if device.type == "cpu" and machine.cpus and each != "auto" and each > machine.cpus:
        yield _warning(
            None,
            "engine.processes",
            f"{each} processes share {machine.cpus} CPU cores: they wait for each other",
            f"use `processes: {machine.cpus}`",
        )


def _reduction_warnings(engine: Engine, meaning: Numerics) -> Iterator[Problem]:
    """Gradients that are rounded before they are added up over the processes."""
    field, exact, half = "", "", ""
    if isinstance(engine, Ddp):
        field, exact, half = "gradient_compression", "none", engine.gradient_compression
    elif isinstance(engine, Fsdp2):
        field, exact, half = "reduce_dtype", "fp32", engine.reduce_dtype
    if half in (exact, dtype_name(meaning.weights)):
        return
    if half == "fp16":
        what = (
            "gradients are added up in fp16: below 2^-25 they become zero, and a sum over 65504 "
            "skips the step"
        )
    else:
        what = "gradients are added up in bf16: every sum is rounded to 8 bits"
    yield _warning("half-reduction", f"engine.{field}", what, f"use `{field}: {exact}`")


def _batchnorm_warnings(
    recipe: Recipe,
    device: torch.device,
    precision: PrecisionPlan,
    world_size: int,
    micro_batch: int,
) -> Iterator[Problem]:
    """Statistics of few samples, or of those of one process alone."""
    engine = recipe.engine
    synchronised = isinstance(engine, Ddp) and engine.sync_batch_norm
    if not has_batch_norm(precision.modules):
        if synchronised:
            what, hint = "the model has no BatchNorm", "use `sync_batch_norm: false`"
            yield _warning(None, "engine.sync_batch_norm", what, hint)
        return
    samples = micro_batch * world_size if synchronised else micro_batch
    if samples <= FEW_SAMPLES:
        batch = recipe.train.global_batch_size
        limit = "micro_batch_size" if micro_batch * world_size < batch else "global_batch_size"
        yield _warning(
            "batchnorm-stats",
            f"train.{limit}",
            f"BatchNorm takes its statistics of {samples} samples at a time: too few to stand "
            "for the data",
            f"use a larger `{limit}`, or a model with another norm",
        )
    elif world_size > 1 and not synchronised:
        may_synchronise = isinstance(engine, Ddp) and device.type == "cuda"
        remedy = "`sync_batch_norm: true`" if may_synchronise else "a larger `global_batch_size`"
        yield _warning(
            "batchnorm-stats",
            "engine.kind",
            f"BatchNorm takes its statistics of the {samples} samples that each of {world_size} "
            "processes has at a time, and keeps those of process 0",
            f"use {remedy}, or a model with another norm",
        )


def _fp16_scale_warnings(loss_scale: LossScale) -> Iterator[Problem]:
    path, hint = "precision.loss_scale", "use `loss_scale: {kind: dynamic}`"
    match loss_scale:
        case NoScale():
            what = "without a loss scale, gradients of 2^-25 and less become zero in fp16"
            yield _warning("underflow", path, what, hint)
            return
        case StaticScale():
            high = low = (f"{path}.scale", loss_scale.scale)
        case ScheduledScale():
            scales = [scale for _, scale in loss_scale.points]
            high, low = (f"{path}.points", max(scales)), (f"{path}.points", min(scales))
        case DynamicScale():  # which leaves a range only where its bounds lie outside
            high = (f"{path}.min_scale", min(floor for _, floor in loss_scale.floors))
            low = (f"{path}.max_scale", loss_scale.max_scale)
        case _:
            assert_never(loss_scale)
    if high[1] > LARGE_SCALE:
        what = (
            f"a {loss_scale.kind} scale of {high[1]:g} takes scaled gradients over "
            "65504, fp16's largest number: every step may be skipped"
        )
        yield _warning("scale-too-high", high[0], what, hint)
    if low[1] < 1:
        what = (
            f"a {loss_scale.kind} scale of {low[1]:g} makes gradients smaller: "
            "more of them become zero in fp16"
        )
        yield _warning("underflow", low[0], what, hint)


def _dynamic_scale_warnings(loss_scale: DynamicScale) -> Iterator[Problem]:
    path = "precision.loss_scale"
    lost = math.log(1 / loss_scale.backoff_factor)
    growths = lost / math.log(loss_scale.growth_factor)  # that make up for one back-off
    good = growths * loss_scale.growth_interval
    share = loss_scale.hysteresis / (loss_scale.hysteresis + good)
    lowest = min(floor for _, floor in loss_scale.floors)
    if share > OFTEN and loss_scale.max_scale > loss_scale.init_scale:
        yield _warning(
            "skip-storm",
            f"{path}.growth_interval",
            f"the scale grows back after {good:.2g} good steps: it overflows again and again, and "
            f"about {share:.0%} of all steps are skipped",
            "use `growth_interval: 2000`, `growth_factor: 2` and `backoff_factor: 0.5`",
        )
    if loss_scale.backoff_factor < DEEP_BACKOFF and lowest < loss_scale.init_scale / 2**6:
        after = max(loss_scale.init_scale * loss_scale.backoff_factor, lowest)
        yield _warning(
            "underflow",
            f"{path}.backoff_factor",
            f"one overflow takes the scale from {loss_scale.init_scale:g} to {after:.2g}, where "
            f"small gradients become zero, for {good:,.0f} steps",
            "use `backoff_factor: 0.5`",
        )
    if lowest < 1 <= loss_scale.max_scale:
        yield _warning(
            "scale-collapse",
            f"{path}.min_scale",
            f"the scale may fall to {lowest:g}: below 1 it makes gradients smaller, and what still "
            "overflows then is no fault of the scale",
            "use `min_scale: 1`",
        )


def _update_warnings(recipe: Recipe, steps: int) -> Iterator[Problem]:
    """Rates and epsilons that are out of all proportion in every precision."""
    optim = recipe.optim
    is_adam = isinstance(optim, Adam | AdamW | AdamW8bit | Muon)  # Muon's steps are as long
    highest = ADAM_LARGEST_LR if is_adam else SGD_LARGEST_LR
    if optim.lr >= highest:
        each = "every weight moves by about the rate" if is_adam else "steps are that long"
        yield _warning(
            "learning-rate",
            "optim.lr",
            f"a rate of {optim.lr:g}: {each}, and weights begin well below 1",
            "use `lr: 1e-3`" if is_adam else "use `lr: 0.1`",
        )
    if isinstance(optim, Adam | AdamW | AdamW8bit | Muon):
        if optim.lr * steps < LEAST_MOVE:
            yield _warning(
                "learning-rate",
                "optim.lr",
                f"a rate of {optim.lr:g}: all {steps:,} steps together move a weight by about "
                f"{optim.lr * steps:.1g} at most",
                "use `lr: 1e-3`",
            )
        if optim.eps >= LARGE_EPS:
            yield _warning(
                "adam-eps",
                "optim.eps",
                f"eps {optim.eps:g} is far above the root of usual second moments: updates are "
                "divided by it alone",
                "use `eps: 1e-8`",
            )
        elif optim.eps < FP32_SAFE_EPS:
            yield _warning(
                "adam-eps",
                "optim.eps",
                f"second moments below 2^-149 become zero in fp32 too: updates are divided by "
                f"{optim.eps:g}",
                "use `eps: 1e-8`",
            )


def _pure_warnings(recipe: Recipe, half: str, half_norms: int) -> Iterator[Problem]:
    if not recipe.precision.stochastic_rounding:
        bits = {"fp16": 11, "bf16": 8}[half]
        yield _warning(
            "lost-updates",
            "precision.mode",
            f"without master weights, an update below 2^-{bits + 1} of its {half} weight is lost",
            f"use `mode: {half}-master`"
            + (", or `stochastic_rounding: true`" if half == "bf16" else ""),
        )
    optim = recipe.optim
    if half == "fp16" and isinstance(optim, Adam | AdamW) and optim.eps < FP16_SAFE_EPS:
        yield _warning(
            "adam-eps",
            "optim.eps",
            f"second moments below 2^-25 become zero in fp16: updates are divided by {optim.eps:g}",
            "use `eps: 1e-4`, or `mode: fp16-master`",
        )
    if half == "bf16" and isinstance(optim, Adam | AdamW) and 1 - optim.betas[1] < 2.0**-9:
        yield _warning(
            "lost-updates",
            "optim.betas",
            f"a bf16 second moment cannot fall by 1 - {optim.betas[1]:g} of itself: it only grows",
            "use `betas: [0.9, 0.99]`, or `mode: bf16-master`",
        )
    if half_norms:
        yield _warning(
            "norm-in-half",
            "precision.sensitive_layers",
            f"{half_norms} norm layers compute in {half}",
            "add `norm` to `sensitive_layers`",
        )
