"""Memory: what a run that ended for lack of it had there, and which change saves how much."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mpcli.diagnose import remedies
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding, Suggestion
from mpcli.plan.micro_batch import smaller
from mpcli.precision.numerics import numerics
from mpcli.recipe.errors import Exit
from mpcli.recipe.optim import Sgd
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan, Result

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_CAPACITY = re.compile(r"total capacity of ([\d.]+) ([KMGT]iB)")  # of torch's own message
GIB = 2**30


def out_of_memory(evidence: Evidence) -> Iterator[Finding]:
    """A run of ours that the device had no room for."""
    result = evidence.facts.run.result if evidence.facts.run else None
    recipe, plan = evidence.recipe, evidence.plan
    if result is None or recipe is None or plan is None or not _ended_so(result):
        return
    parts = fixed_bytes(recipe, plan.parameters)
    fixed = sum(parts.values())
    capacity = _capacity(result.reason or "")
    peak = max(result.peak_memory_bytes, capacity or 0)
    others = max(peak - fixed, 0)  # activations, and what libraries need
    changes = _changes(recipe, plan, parts, others)
    yield Finding(
        id="out-of-memory",
        severity="error",
        cause=f"the {plan.device} had no room: {fixed / GIB:.3g} GiB are weights, gradients and "
        f"optimizer state, and the activations of {plan.micro_batch_size} samples came on top",
        phase="update" if capacity and fixed > capacity else "forward",
        step=result.steps_attempted + 1,
        confidence=1.0,
        evidence={
            **parts,
            "activations_and_rest_bytes": others if peak else None,
            "peak_bytes": peak or None,
            "capacity_bytes": capacity,
        },
        suggestion=changes[0] if changes else None,
        alternatives=tuple(changes[1:]),
    )


def _ended_so(result: Result) -> bool:
    return result.exit_code == Exit.ENVIRONMENT and "out of memory" in (result.reason or "")


def _capacity(reason: str) -> int | None:
    found = _CAPACITY.search(reason)
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


def fixed_bytes(recipe: Recipe, parameters: int) -> dict[str, int]:
    """Bytes that do not depend on the batch: docs/precision.md has those of a parameter."""
    meaning = numerics(recipe.precision.mode)
    stored = meaning.weights.itemsize
    stepped = 4 if meaning.masters else stored
    match recipe.optim:
        case Sgd(momentum=momentum):
            states = 1 if momentum else 0
        case _:
            states = 2
    average = 4 if recipe.train.ema else 0
    return {
        "weights_bytes": parameters * (stored + (4 if meaning.masters else 0) + average),
        "gradients_bytes": parameters * stepped,
        "optimizer_bytes": parameters * stepped * states,
    }


def _changes(recipe: Recipe, plan: Plan, parts: dict[str, int], others: int) -> list[Suggestion]:
    """Those that save most first; what they save is of the peak.

    Where no peak is known, fewer activations come first: only they can have been any number.
    """
    saving: list[tuple[float, Suggestion]] = []
    if size := smaller(recipe, plan):
        saving.append((others / 2, remedies.smaller_micro_batch(size)))
    if not recipe.engine.activation_checkpointing:  # of the rest the blocks' inputs stay
        saving.append((others / 3, remedies.activation_checkpointing()))
    meaning = numerics(recipe.precision.mode)
    if meaning.compute.itemsize == 4:
        saving.append((others / 4, remedies.half_activations()))
    if not (meaning.half_weights and not meaning.masters):
        half = sum(fixed_bytes(_pure(recipe), plan.parameters).values())
        saving.append((sum(parts.values()) - half, remedies.bf16_pure()))
    ordered = sorted(saving, key=lambda change: -change[0]) if others else saving
    return [_with_saving(change, saved) for saved, change in ordered]


def _pure(recipe: Recipe) -> Recipe:
    pure = recipe.precision.model_copy(update={"mode": "bf16-pure"})
    return recipe.model_copy(update={"precision": pure})


def _with_saving(change: Suggestion, saved: float) -> Suggestion:
    about = f" (saves about {saved / GIB:.2g} GiB)" if saved >= GIB / 100 else ""
    return change.model_copy(update={"what": change.what + about})
