"""Memory of a rank where weights, gradients and optimizer state are divided among ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import nn

from mpcli.engines.deepspeed import BUCKET
from mpcli.engines.fsdp2 import blocks, shares
from mpcli.plan.fake import meta_model
from mpcli.plan.step import Moment, Step
from mpcli.precision.convert import modules_inside
from mpcli.precision.numerics import numerics
from mpcli.recipe.engine import DeepSpeed, Fsdp2
from mpcli.recipe.recipe import Recipe
from mpcli.tasks import Dataset

FP32 = 4
DEEPSPEED_LIVE = 10**9
"""Elements of weights that its stage 3 lets lie gathered when they are used again soon."""


def fsdp2(
    step: Step,
    engine: Fsdp2,
    recipe: Recipe,
    data: Dataset,
    world_size: int,
    several: bool,
    fp32_modules: Collection[str],
) -> tuple[Step, int]:
    """On the device, and bytes on the host, of the rank with most rows.

    Shards are fp32. A block's weights are gathered twice over: all ranks' shards in a row, and cut
    into parameters; the next block's may be on their way already. Its gradients are whole, and
    once more in a row of fp32, before they are added up.

    Args:
        step: of one process.
        several: whether a step has several micro-batches: gradients are whole until the last.
    """
    model = meta_model(recipe, data)
    meaning = numerics(recipe.precision.mode)
    inside = modules_inside(model, fp32_modules)
    owners = {p: module for module in model.modules() for p in module.parameters(recurse=False)}

    def gathered(parameters: Iterable[nn.Parameter]) -> int:
        types = ((p, FP32 if owners[p] in inside else meaning.weights.itemsize) for p in parameters)
        return sum(p.numel() * size for p, size in types)

    whole = sum(p.numel() for p in model.parameters())
    rows = sum(math.ceil(len(p) / world_size) * (p.numel() // len(p)) for p in model.parameters())
    share = rows / whole
    divided = [block for block in blocks(model) if block is not model and not shares(model, block)]
    sizes = [gathered(block.parameters()) for block in divided]
    root = gathered(model.parameters()) - sum(sizes)
    largest = max(sizes, default=0)
    there = root + (2 * largest if engine.reshard_after_forward else sum(sizes))
    in_a_row = largest or root
    fp32_per_byte = FP32 / meaning.weights.itemsize
    reduced = round(max(largest, root) * (1 + fp32_per_byte))
    accumulated = step.gradients if several else 0
    gradients = round(step.gradients * share)

    def here(moment: Moment) -> Moment:
        if moment.phase == "update":  # of shards, on the host with `cpu_offload`
            rest = 0 if engine.cpu_offload else round(moment.rest * share)
            kept = 0 if engine.cpu_offload else gradients
            return Moment("update", kept, 0, 0, rest)
        backward = moment.phase == "backward"
        rest = moment.rest + there + in_a_row + accumulated + (reduced if backward else 0)
        made = 0 if engine.cpu_offload else round(moment.gradients * share)
        return Moment(moment.phase, made, 0, moment.activations, rest)

    parts = {
        "weights": FP32 * rows,
        "masters": 0,
        "gradients": gradients,
        "optimizer": round(step.optimizer * share),
        "average": round(step.average * share),
    }
    host = sum(parts.values()) if engine.cpu_offload else 0
    if engine.cpu_offload:
        parts = dict.fromkeys(parts, 0)
    return replace(step, **parts, moments=tuple(map(here, step.moments))), host


def deepspeed(step: Step, engine: DeepSpeed, world_size: int) -> tuple[Step, int]:
    """On the device, and bytes on the host.

    Rajbhandari et al., ZeRO, 2020, figure 1: stage 1 divides fp32 weights and optimizer state,
    stage 2 gradients too, stage 3 weights too. Beside them are a bucket of gradients and, in
    stage 3, weights that are gathered. All are fp32 (see `mode_problems` of the engine).

    Args:
        step: of one process.
    """
    part_of_weights = math.ceil(step.weights / world_size)
    gradients = math.ceil(step.gradients / world_size)
    kept = step.gradients if engine.stage == 1 else gradients
    bucket = min(FP32 * BUCKET, step.weights)
    gathered = min(FP32 * DEEPSPEED_LIVE, step.weights) if engine.stage == 3 else 0
    parts = {
        "weights": part_of_weights if engine.stage == 3 else step.weights,
        "masters": part_of_weights,
        "gradients": gradients,
        "optimizer": math.ceil(step.optimizer / world_size),
        "average": math.ceil(step.average / world_size),
    }
    away = ("masters", "gradients", "optimizer", "average") if engine.offload else ()
    if engine.offload_parameters:
        away = ("weights", *away)
    host = sum(parts[name] for name in away)
    parts |= dict.fromkeys(away, 0)

    def here(moment: Moment) -> Moment:
        if moment.phase == "update":
            rest = 0 if engine.offload else math.ceil(moment.rest / world_size)
            return Moment("update", parts["gradients"], 0, 0, rest)
        backward = moment.phase == "backward"
        rest = moment.rest + gathered + (bucket + kept if backward else 0)
        return Moment(moment.phase, 0, 0, moment.activations, rest)

    return replace(step, **parts, moments=tuple(map(here, step.moments))), host
