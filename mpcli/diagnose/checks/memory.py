"""Memory: what a run that ended for lack of it needs there, and which change saves how much."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from mpcli.diagnose import remedies
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding, Suggestion
from mpcli.machine import detect_machine
from mpcli.plan.fake import meta_model
from mpcli.plan.memory_text import size_text
from mpcli.plan.micro_batch import halved, needed
from mpcli.plan.precision import fp32_islands
from mpcli.precision.numerics import numerics
from mpcli.recipe.errors import Exit
from mpcli.recipe.precision import Mode
from mpcli.recipe.recipe import Recipe
from mpcli.records import MemoryPlan, Plan, Result
from mpcli.tasks import task_of

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_CAPACITY = re.compile(r"total capacity of ([\d.]+) ([KMGT]iB)")  # of torch's own message


def out_of_memory(evidence: Evidence) -> Iterator[Finding]:
    """A run of ours that the device had no room for."""
    result = evidence.facts.run.result if evidence.facts.run else None
    recipe, plan = evidence.recipe, evidence.plan
    if result is None or recipe is None or plan is None or not _ended_so(result):
        return
    memory = _needed(recipe, plan)
    samples = f"{plan.micro_batch_size} sample{'s' * (plan.micro_batch_size > 1)}"
    cause = f"the {plan.device} had no room for a step with micro-batches of {samples}"
    if memory:
        fixed = memory.weights + memory.masters + memory.gradients + memory.optimizer
        cause += (
            f": {size_text(fixed)} of weights, gradients and optimizer state, and activations "
            f"of {size_text(memory.activations)}"
        )
    changes = _changes(recipe, plan, memory)
    yield Finding(
        id="out-of-memory",
        severity="error",
        cause=cause,
        phase=memory.peak_at if memory else "forward",
        step=result.steps_attempted + 1,
        confidence=1.0,
        evidence={
            **(_parts(memory) if memory else {}),
            "measured_peak_bytes": result.peak_memory_bytes or None,
            "capacity_bytes": _capacity(result.reason or ""),
        },
        suggestion=changes[0] if changes else None,
        alternatives=tuple(changes[1:]),
    )


def _ended_so(result: Result) -> bool:
    return result.exit_code == Exit.ENVIRONMENT and "out of memory" in (result.reason or "")


def _capacity(reason: str) -> int | None:
    found = _CAPACITY.search(reason)
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


def _needed(recipe: Recipe, plan: Plan) -> MemoryPlan | None:
    """What is planned to be needed; None: nobody knows, or the data are not here."""
    try:
        data = task_of(recipe.task).load_data(recipe.task, recipe.data)
        model, device = meta_model(recipe, data), torch.device(plan.device)
        islands = fp32_islands(recipe.precision, model, device, detect_machine())
        return needed(recipe, plan.model_copy(update={"fp32_modules": tuple(islands)}))
    except Exception:  # models and data are as many as their faults
        return None


def _parts(memory: MemoryPlan) -> dict[str, int]:
    """Those that are there, and the peak, which is not their sum."""
    names = ("weights", "masters", "gradients", "optimizer", "average", "activations", "peak")
    return {f"{name}_bytes": size for name in names if (size := getattr(memory, name))}


def _changes(recipe: Recipe, plan: Plan, memory: MemoryPlan | None) -> list[Suggestion]:
    """Those that are planned to save most first, and none that saves nothing.

    Where what a step needs is not known, all of them, those first that change least.
    """
    tried: list[tuple[Suggestion, Recipe, Plan]] = []
    if half := halved(recipe, plan):
        tried.append((remedies.smaller_micro_batch(half.micro_batch_size), recipe, half))
    if not recipe.engine.activation_checkpointing:
        again = recipe.engine.model_copy(update={"activation_checkpointing": True})
        changed = recipe.model_copy(update={"engine": again})
        tried.append((remedies.activation_checkpointing(), changed, plan))
    meaning = numerics(recipe.precision.mode)
    if meaning.compute.itemsize == 4:
        tried.append((remedies.half_activations(), _in_mode(recipe, "bf16"), plan))
    if not (meaning.half_weights and not meaning.masters):
        tried.append((remedies.bf16_pure(), _in_mode(recipe, "bf16-pure"), plan))
    if memory is None:
        return [change for change, _, _ in tried]
    saving: list[tuple[int, Suggestion]] = []
    for change, changed, its_plan in tried:
        with_it = _needed(changed, its_plan)
        if with_it and with_it.peak < memory.peak:
            saving.append((memory.peak - with_it.peak, change))
    ordered = sorted(saving, key=lambda one: -one[0])
    return [_with_saving(change, saved) for saved, change in ordered]


def _in_mode(recipe: Recipe, mode: Mode) -> Recipe:
    precision = recipe.precision.model_copy(update={"mode": mode})
    return recipe.model_copy(update={"precision": precision})


def _with_saving(change: Suggestion, saved: int) -> Suggestion:
    return change.model_copy(update={"what": f"{change.what} (saves about {size_text(saved)})"})
