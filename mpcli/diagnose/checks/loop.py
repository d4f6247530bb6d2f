"""What a loop does wrong around the numbers: the order of its calls, and what never happens.

Only a recorder sees that, in `events.jsonl`, which has a row for each step whose events are others
than those of the step before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mpcli.diagnose import remedies
from mpcli.diagnose.checks.foreign import FOREIGN
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding
from mpcli.precision.observe import LOSS
from mpcli.records import LoopEvent, LoopRecord, ModuleTypes

LEAST_LIMIT = 0.01
"""A limit that is less than this, times the scale, was not meant for scaled gradients: those in use
are from 0.1 (wav2vec) to 40 (A3C), and who clips scaled gradients on purpose multiplies them."""
MOST = 0.5
"""Of the weights that multiply: an island that holds more of them is no exception any more."""


def autocast_inactive(evidence: Evidence) -> Iterable[Finding]:
    """Half precision was asked for, and every forward ran in fp32.

    Asked for is it by the arguments of a Trainer, or by a scaler that scales. A scaler that is
    switched off is mostly so on purpose: that is information.
    """
    forwards = [event for _, event in _all(evidence) if event.event == "forward"]
    if not forwards or any(event.autocast != "off" for event in forwards) or _has_half(evidence):
        return
    settings = _settings(evidence)
    scaled = any(event.event == "scale" for _, event in _all(evidence))
    asked = next((half for half in ("fp16", "bf16") if settings.get(half) is True), None)
    if asked is None and settings.get("mixed_precision") in ("fp16", "bf16"):
        asked = str(settings["mixed_precision"])
    if not (asked or scaled) and settings.get("scaler.enabled") is not False:
        return
    why = f"{asked} was asked for" if asked else "the loop has a GradScaler"
    is_meant = bool(asked or scaled)
    yield Finding(
        id="autocast-inactive",
        severity="warning" if is_meant else "info",
        cause=f"{why}, but autocast is off in every forward and all modules compute in fp32: "
        "half precision is not used"
        if is_meant
        else "The GradScaler is switched off and autocast too: the run is in fp32",
        phase="forward",
        step=evidence.events[0].step,
        confidence=1.0 if is_meant else 0.5,
        evidence={
            "asked_for": asked or ("a scaler" if scaled else None),
            "autocast": "off",
            "scaler_enabled": bool(settings.get("scaler.enabled", False)),
        },
        suggestion=remedies.autocast(evidence),
        alternatives=(remedies.fp32(evidence),),
    )


def fp32_island(evidence: Evidence) -> Iterable[Finding]:
    """Modules whose products are fp32 while those of others are half.

    Those that `sensitive_layers` asks for are told where they hold most of the weights.
    """
    types = evidence.facts.run.types if evidence.facts.run else {}
    multiplying = {
        name: seen for name, seen in types.items() if name != LOSS and seen.operands != "-"
    }
    islands = [name for name, seen in multiplying.items() if seen.operands == "fp32"]
    if not islands or all(seen.operands == "fp32" for seen in multiplying.values()):
        return
    sizes = _sizes(evidence)
    total = sum(sizes.get(name, 0) for name in multiplying)
    share = sum(sizes.get(name, 0) for name in islands) / total if total else 0.0
    if share > MOST and not _wants_half(evidence):
        return  # then the half ones are the exception
    planned = evidence.plan.fp32_modules if evidence.plan else ()
    is_planned = all(_inside(name, planned) for name in islands)
    if is_planned and share <= MOST:
        return
    cast_in, cast_out = _casts(evidence, islands, types)
    islands.sort(key=lambda name: -sizes.get(name, 0))
    yield Finding(
        id="fp32-island",
        severity="warning" if share > MOST and not is_planned else "info",
        cause=f"{_listed(islands)} multiply in fp32 while other modules do in half: they hold "
        f"{share:.0%} of the weights that multiply",
        layers=tuple(islands),
        phase="forward",
        confidence=0.9,
        evidence={
            "modules_in_fp32": len(islands),
            "modules_that_multiply": len(multiplying),
            "share_of_weights": round(share, 4),
            "modules_given_half": cast_in,
            "values_cast_back_per_step": cast_out,
        },
        suggestion=remedies.half_layers(evidence, tuple(islands)),
    )


def clip_before_unscale(evidence: Evidence) -> Iterable[Finding]:
    """Gradients were clipped while they still were multiplied by the loss scale."""
    for step, clip in _at_untouched(evidence, "clip_norm", "clip_value"):
        scale = evidence.history.at(step, "scale")
        if clip.gradients != "scaled" or clip.limit is None or not scale > 1:
            continue
        if clip.limit >= LEAST_LIMIT * scale:
            continue
        norm = math.nan if clip.norm is None else clip.norm
        kind = "a norm" if clip.event == "clip_norm" else "values"
        shares = _clipped(evidence, clip.limit)
        yield Finding(
            id="clip-before-unscale",
            severity="warning" if norm <= clip.limit else "error",
            cause=f"Gradients are clipped to {kind} of {clip.limit:g} before they are unscaled: of "
            f"the gradients themselves, that is {clip.limit / scale:.2g}",
            phase="update",
            step=step,
            confidence=1.0,
            evidence={
                "limit": clip.limit,
                "loss_scale": scale,
                "limit_unscaled": clip.limit / scale,
                "norm_unscaled": norm / scale,
                "share_of_steps_clipped": shares[0],
                "share_of_steps_clipped_if_unscaled": shares[1],
            },
            suggestion=remedies.clip_unscaled(
                evidence, clip.limit, is_norm=clip.event == "clip_norm"
            ),
        )
        return


def missing_unscale(evidence: Evidence) -> Iterable[Finding]:
    """The optimizer stepped on gradients that still were multiplied by the loss scale.

    A step within `scaler.step` is the scaler's: some optimizers are given the scale in other ways.
    """
    for step, stepped in _at_untouched(evidence, "optimizer_step"):
        scale = evidence.history.at(step, "scale")
        if stepped.gradients != "scaled" or stepped.by == "scaler.step" or not scale > 1:
            continue
        norm = evidence.history.at(step, "grad_norm")
        yield Finding(
            id="missing-unscale",
            severity="error",
            cause=f"The optimizer steps on gradients that are still multiplied by the loss scale: "
            f"they are {scale:g} times too large",
            phase="update",
            step=step,
            confidence=1.0,
            evidence={
                "loss_scale": scale,
                "norm_used": norm * scale,
                "norm_unscaled": norm,
            },
            suggestion=remedies.scaler_step(evidence),
        )
        return


_WRONG_WINDOWS = {
    "used": (
        "error",
        "Gradients that the optimizer has used are not zeroed: it uses them again, added to those "
        "of the next batch",
    ),
    "unscaled": (
        "error",
        "Gradients are unscaled before all micro-batches of a step are added up: the later ones "
        "are too large by the loss scale",
    ),
    "updated": (
        "warning",
        "The loss scale is updated between the micro-batches of one step: when it changes, they "
        "are added up at different scales",
    ),
    "mixed": (
        "error",
        "In one step, some backwards are of a scaled loss and some are not: unscaling makes the "
        "latter too small by the loss scale",
    ),
}
"""Severity and cause, by what was wrong."""


def accumulation(evidence: Evidence) -> Iterable[Finding]:
    """Gradients that one optimizer step uses do not belong together."""
    for step, wrong, event in _windows(evidence):
        if wrong != "used" and not evidence.history.at(step, "scale") > 1:
            continue
        severity, cause = _WRONG_WINDOWS[wrong]
        yield Finding.model_validate({
            "id": "accumulation",
            "severity": severity,
            "cause": cause,
            "phase": "update",
            "step": step,
            "confidence": 1.0,
            "evidence": {
                "loss_scale": evidence.history.at(step, "scale"),
                "norm_unscaled": evidence.history.at(step, "grad_norm"),
                "norm_left_over": event.norm if event.event == "stale_gradients" else None,
            },
            "suggestion": remedies.window(evidence, zero=wrong == "used", scale=wrong == "mixed"),
        })  # fmt: skip
        return


def optimizer_state_corrupted(evidence: Evidence) -> Iterable[Finding]:
    """A step that was skipped changed the optimizer's state all the same."""
    for row in evidence.events:
        changed = [event.name for event in row.events if event.event == "state_changed"]
        names = [name.rpartition(".") for name in changed if name]
        if not names:
            continue
        kind = names[0][2]
        optimizer = evidence.foreign.optimizer if evidence.foreign else "the optimizer"
        yield Finding(
            id="optimizer-state-corrupted",
            severity="error",
            cause=f"Step {row.step} was skipped, but left other values in `{kind}` of {optimizer}: "
            "the next steps use them",
            layers=tuple(dict.fromkeys(name.rpartition(".")[0] for name, _, _ in names)),
            phase="update",
            step=row.step,
            confidence=1.0,
            evidence={
                "tensors_changed": len(names),
                "state": kind,
                "fused": bool(_settings(evidence).get("optimizer.fused")),
                "loss_scale": evidence.history.at(row.step, "scale"),
            },
            suggestion=remedies.unfused(evidence),
            alternatives=(remedies.lower_first_scale(evidence),),
        )
        return


def _windows(evidence: Evidence) -> Iterator[tuple[int, str, LoopEvent]]:
    """Steps of the optimizer on gradients that do not belong together, why, and what showed it.

    What was done to the gradients since they last were zeroed is followed from event to event. It
    is no fault before the optimizer uses them: the discriminator of a GAN has gradients of the
    generator's loss, too, until they are zeroed.
    """
    done: set[str] = set()
    wrong: tuple[str, LoopEvent] | None = None
    for row in _as_they_were(evidence):
        is_first, is_left_over = True, False
        for event in row.events:
            match event.event:
                case "zero_grad" | "gradients_changed":  # by hand, which may be to zero
                    done, wrong = set(), None
                case "stale_gradients":
                    is_left_over = True
                    wrong = _why(done, event)
                case "backward":
                    if is_first and not is_left_over:  # they were zeroed between two steps
                        done, wrong = set(), None
                    wrong = wrong or _why(done, event)
                    is_first = False
                case "unscale":
                    done.add("unscaled")
                case "scaler_update":
                    done.add("updated")
                case "optimizer_step" | "skipped_step" if not is_first:
                    if wrong or event.gradients == "mixed":
                        yield row.step, *(wrong or ("mixed", event))
                    done.add("used")
        if row.left_out:
            done, wrong = set(), None


def _why(done: set[str], event: LoopEvent) -> tuple[str, LoopEvent] | None:
    """What makes it wrong to add gradients now."""
    return next(((why, event) for why in ("used", "unscaled", "updated") if why in done), None)


def _as_they_were(evidence: Evidence) -> Iterator[LoopRecord]:
    """Rows of events, twice where several steps had the same."""
    last = int(evidence.history.step[-1]) if len(evidence.history) else 0
    following = [row.step for row in evidence.events[1:]] + [last + 1]
    for row, until in zip(evidence.events, following, strict=False):
        yield row
        if until > row.step + 1:
            yield row.model_copy(update={"step": row.step + 1})


def _all(evidence: Evidence) -> Iterator[tuple[int, LoopEvent]]:
    return ((row.step, event) for row in evidence.events for event in row.events)


def _at_untouched(evidence: Evidence, *names: str) -> Iterator[tuple[int, LoopEvent]]:
    """Events of these names, where nothing but backward wrote to the gradients before.

    What a loop does to them by hand may be unscaling.
    """
    for row in evidence.events:
        by_hand = False
        for event in row.events:
            by_hand = event.event == "gradients_changed" or (by_hand and event.event != "zero_grad")
            if event.event in names and not by_hand:
                yield row.step, event


def _has_half(evidence: Evidence) -> bool:
    """Whether anything of a model is stored or computed in half."""
    run = evidence.facts.run
    seen = [part for t in run.types.values() for part in (t.computed, t.stored)] if run else []
    seen += [module.stored for module in run.foreign.modules] if run and run.foreign else []
    return any("fp16" in types or "bf16" in types for types in seen)


def _wants_half(evidence: Evidence) -> bool:
    """Whether half is meant for the whole of a model: by its recipe, or by autocast."""
    autocast = [e.autocast for _, e in _all(evidence) if e.event == "forward" and e.autocast]
    return evidence.recipe is not None or any(kind != "off" for kind in autocast)


def _settings(evidence: Evidence) -> dict[str, float | bool | str | None]:
    foreign = evidence.foreign
    return foreign.settings if foreign else {}


def _sizes(evidence: Evidence) -> dict[str, int]:
    """Module -> number of its own weights."""
    if evidence.plan:
        return {module.name: module.parameters for module in evidence.plan.modules}
    foreign = evidence.foreign
    return {module.name: module.parameters for module in foreign.modules} if foreign else {}


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _casts(
    evidence: Evidence, islands: list[str], types: dict[str, ModuleTypes]
) -> tuple[int, int | None]:
    """How many islands are given half values, and how many values they give back in fp32."""
    given = sum("16" in types[name].inputs for name in islands)
    if not evidence.samples:
        return given, None
    outputs = evidence.samples[0].of("output")
    return given, sum(row.elements for row in outputs if row.module in islands)


def _clipped(evidence: Evidence, limit: float) -> tuple[float | None, float | None]:
    """Shares of the steps with gradients above a limit: as they are scaled, and unscaled."""
    norms, scales = evidence.history.grad_norm, evidence.history.scale
    known = np.isfinite(norms)
    if not known.any():
        return None, None
    scaled = norms[known] * scales[known]
    return float((scaled > limit).mean()), float((norms[known] > limit).mean())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


LOOP: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
    autocast_inactive,
    fp32_island,
    clip_before_unscale,
    missing_unscale,
    accumulation,
    optimizer_state_corrupted,
    *FOREIGN,
)
