"""What is not finite, or became zero, in a loop that is not ours and cannot be run again.

The recorder looked for the origin of NaN and infinity on the spot (`flight.json`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mpcli.diagnose import remedies
from mpcli.diagnose.born import at_scale_1, has_pole, largest_gradient
from mpcli.diagnose.checks.nonfinite import severity_of
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding, Suggestion
from mpcli.diagnose.modules import FP16_OVERFLOW, place_of
from mpcli.diagnose.remedies import FP16_MAX
from mpcli.precision.observe import LOSS
from mpcli.records import FlightRecord, LayerRecord, NonFiniteOrigin

Numbers = dict[str, float | str | bool | None]

SPIKE = 2.0**8
"""How much larger than in any sampled step values may become in an ordinary one: infinity that
would take more than that is not the doing of a number format, or of the loss scale."""


def foreign_nonfinite(evidence: Evidence) -> Iterable[Finding]:
    """The first NaN or infinity of a loop, from the origin that was found on the spot.

    Infinite gradients are none where a high loss scale explains them: it finds its level that way.
    """
    run = evidence.facts.run
    if run is None or not evidence.is_foreign:
        return
    for flight in sorted(run.flights, key=lambda flight: flight.step):
        if flight.origin is None:
            continue
        found: Finding | None
        if flight.origin.phase == "input" or _is_cast_of_batch(flight, flight.origin):
            found = _batch(evidence, flight, flight.origin)
        elif flight.origin.operation == "weights":
            found = _weights(evidence, flight, flight.origin)
        elif flight.origin.phase == "forward":
            found = _forward(evidence, flight, flight.origin)
        else:
            found = _backward(evidence, flight, flight.origin)
        if found is not None:
            yield found
            return


def unsampled_underflow(evidence: Evidence) -> Iterable[Finding]:
    """No gradient is left in fp16, in a loop of which no step was sampled (`every=0`)."""
    if not evidence.is_foreign or evidence.compute != "fp16" or evidence.samples:
        return
    if len(gone := _steps_without_gradient(evidence)):
        step = int(gone[0])
        scale = evidence.history.at(step, "scale")
        yield Finding(
            id="underflow",
            severity="error",
            cause=f"In {len(gone)} steps all gradients are zero, though the loss is not: fp16 "
            f"cannot hold them at a loss scale of {scale:g}",
            phase="backward",
            step=step,
            confidence=0.7,
            evidence={"steps_without_gradient": len(gone), "loss_scale": scale},
            suggestion=remedies.dynamic_scale(evidence),
            alternatives=(remedies.bf16(evidence),),
        )


def _scales_by_hand(evidence: Evidence, flight: FlightRecord) -> bool:
    """Whether a loop without a scaler left the step out itself: then it looks for its own scale.

    It found one if a later step was applied; and that it did not may be what it did to the state.
    """
    if flight.applied or (evidence.foreign and evidence.foreign.scaler):
        return False
    history = evidence.history
    goes_on = bool((history.applied & (history.step > flight.step)).any())
    events = (event for row in evidence.events if row.step == flight.step for event in row.events)
    return goes_on or any(event.event == "state_changed" for event in events)


def _is_cast_of_batch(flight: FlightRecord, origin: NonFiniteOrigin) -> bool:
    """Whether autocast made infinity of what the batch itself held."""
    is_cast = origin.operation == "_to_copy" and origin.value == "inf"
    return is_cast and max((flight.largest or {}).values(), default=0.0) >= FP16_OVERFLOW


def _batch(evidence: Evidence, flight: FlightRecord, origin: NonFiniteOrigin) -> Finding:
    cast = origin.value == "inf" and evidence.compute == "fp16"
    also = ", or values above 65504 that the loop made fp16" if cast else ""
    return Finding(
        id="bad-batch",
        severity=severity_of(evidence),
        cause=f"The batch of step {flight.step} holds {origin.value}{also}",
        phase="input",
        step=flight.step,
        confidence=1.0,
        evidence={"value": origin.value, "loss": flight.loss},
        suggestion=Suggestion(
            what=f"look at the batch, which is in flights/step-{flight.step}, and mend the data",
            code="if not all(x.isfinite().all() for x in batch if x.is_floating_point()):\n"
            "    continue",
        ),
    )


def _weights(evidence: Evidence, flight: FlightRecord, origin: NonFiniteOrigin) -> Finding:
    """Loaded so in the first step; else the update before made them so, of finite gradients."""
    is_first = not len(evidence.history) or flight.step == int(evidence.history.step[0])
    place = origin.module or "the model itself"
    if is_first:
        return Finding(
            id="bad-checkpoint",
            severity="error",
            cause=f"The weights of {place} hold {origin.value} before the first step",
            layers=(origin.module,),
            phase="input",
            step=flight.step,
            confidence=1.0,
            evidence={"value": origin.value},
            suggestion=Suggestion(
                what="load other weights",
                code="assert all(w.isfinite().all() for w in model.parameters())",
            ),
        )
    step = flight.step - 1
    rate = evidence.history.at(step, "lr")
    return Finding(
        id="learning-rate",
        severity="error",
        cause=f"The update of step {step} made {origin.value} of weights in {place}, though its "
        "gradients were finite",
        layers=(origin.module,),
        phase="update",
        step=step,
        confidence=0.5 if math.isfinite(rate) else 1.0,
        evidence={
            "learning_rate": rate,
            "gradient_norm": evidence.history.at(step, "grad_norm"),
            "stored": _stored(evidence, origin.module),
        },
        suggestion=remedies.learning_rate(evidence, 0.1),
        alternatives=(remedies.masters(evidence),),
    )


def _forward(evidence: Evidence, flight: FlightRecord, origin: NonFiniteOrigin) -> Finding:
    """An overflow of fp16 is infinite, in fp16 or in a cast to it; of NaN, only near its limit."""
    formats = _formats(evidence, origin.module)
    largest, overflowed = _outputs(evidence, origin.module)
    is_near = overflowed or largest * SPIKE >= FP16_MAX
    is_cast = origin.operation == "_to_copy"  # to bf16, fp32 and fp64 keep their range
    of_format = is_near or (origin.value == "inf" and not has_pole(origin))
    place = place_of(origin.module)
    numbers: Numbers = {
        "value": origin.value,
        "operation": origin.operation,
        "format": "+".join(sorted(formats)) or None,
        "largest_output_sampled": largest or None,
        "loss": flight.loss,
    }
    if is_cast or ("fp16" in formats and of_format):
        what = f"A value that {place} makes fp16" if is_cast else f"The output of {place}"
        wide = [remedies.bf16(evidence)] if _runs_in_fp16(evidence) else []
        mending = [*wide, _layer_in_fp32(evidence, origin.module)]
        return Finding(
            id="forward-overflow",
            severity="error",
            cause=f"{what} leaves the range of fp16 (65504) in step {flight.step}",
            layers=(origin.module,),
            phase="forward",
            step=flight.step,
            confidence=1.0 if is_cast or overflowed else 0.9 if is_near else 0.7,
            evidence=numbers,
            suggestion=mending[0],
            alternatives=tuple(mending[1:]),
        )
    first, *others = _guards(evidence, origin, formats)
    return Finding(
        id="forward-nonfinite",
        severity="error",
        cause=f"{place} makes {origin.value} out of finite numbers in step {flight.step}"
        f"{_within(formats)}",
        layers=(origin.module,),
        phase="forward",
        step=flight.step,
        confidence=0.8,
        evidence=numbers,
        suggestion=first,
        alternatives=tuple(others),
    )


def _backward(evidence: Evidence, flight: FlightRecord, origin: NonFiniteOrigin) -> Finding | None:
    """None where the loss scale may have made it: its overflow is not the module's."""
    formats = _formats(evidence, origin.module)
    expected = largest_gradient(evidence) * flight.scale
    may_overflow = not expected or expected * SPIKE >= FP16_MAX
    if (
        may_overflow
        and evidence.compute in ("fp16", "-")
        and not at_scale_1(evidence.history, flight)
    ):
        return None
    if origin.value == "inf" and evidence.compute == "fp16" and _scales_by_hand(evidence, flight):
        return None
    first, *others = _guards(evidence, origin, formats)
    return Finding(
        id="backward-nonfinite",
        severity="error",
        cause=f"The backward of {place_of(origin.module)} makes {origin.value} out of finite "
        f"numbers in step {flight.step}{_within(formats)}",
        layers=(origin.module,),
        phase="backward",
        step=flight.step,
        confidence=0.9,
        evidence={
            "value": origin.value,
            "operation": origin.operation,
            "format": "+".join(sorted(formats)) or None,
            "loss": flight.loss,
            "loss_scale": flight.scale,
            "largest_gradient_sampled_times_scale": expected or None,
        },
        suggestion=first,
        alternatives=tuple(others),
    )


def _layer_in_fp32(evidence: Evidence, module: str) -> Suggestion:
    if module in ("", LOSS):
        what = (
            "compute the loss in fp32" if module else "compute the model's own operations in fp32"
        )
        return Suggestion(what=what, code="loss = loss_function(output.float(), labels)")
    return remedies.fp32_layers(evidence, (module,))


def _guards(
    evidence: Evidence, origin: NonFiniteOrigin, formats: set[str]
) -> tuple[Suggestion, ...]:
    """In half, its few bits may have made a zero of what is none in fp32."""
    guard = Suggestion(
        what=f"keep {place_of(origin.module)} away from where its operations are singular: "
        "division by 0, the logarithm or the root of 0, the norm of zeros",
        code="x / (y + eps); x.clamp_min(eps).log(); (x.square().sum() + eps).sqrt()",
    )
    if not formats & {"fp16", "bf16"}:
        return (guard,)
    return _layer_in_fp32(evidence, origin.module), remedies.fp32(evidence), guard


def _within(formats: set[str]) -> str:
    return f", in {'+'.join(sorted(formats))}" if formats else ""


def _formats(evidence: Evidence, module: str) -> set[str]:
    """Formats that a module computes in, or gives its results in, as far as it is known."""
    types = evidence.facts.run.types if evidence.facts.run else {}
    found = set(types[module].computed.split("+")) if module in types else set()
    found |= {row.dtype for row in _rows(evidence, "output") if row.module == module}
    return (found or {_stored(evidence, module) or "-"}) - {"-"}


def _stored(evidence: Evidence, module: str) -> str | None:
    foreign = evidence.foreign
    stored = {known.name: known.stored for known in foreign.modules} if foreign else {}
    return stored.get(module)


def _runs_in_fp16(evidence: Evidence) -> bool:
    """Whether autocast is fp16, or most weights are: not a single module among others."""
    events = [event for row in evidence.events for event in row.events]
    if any(event.autocast and "fp16" in event.autocast for event in events):
        return True
    foreign = evidence.foreign
    modules = foreign.modules if foreign else ()
    in_fp16 = sum(module.parameters for module in modules if module.stored == "fp16")
    return 2 * in_fp16 > sum(module.parameters for module in modules)


def _rows(evidence: Evidence, *tensors: str) -> Iterator[LayerRecord]:
    return (row for sample in evidence.samples for row in sample.rows if row.tensor in tensors)


def _outputs(evidence: Evidence, module: str) -> tuple[float, bool]:
    """Largest sampled output of a module, and whether one is infinite only in half."""
    rows = [row for row in _rows(evidence, "output") if row.module == module]
    finite = [row.max for row in rows if math.isfinite(row.max)]
    overflowed = any(row.shadow is not None and row.shadow.overflowed > 0 for row in rows)
    return max(finite, default=0.0), overflowed


def _steps_without_gradient(evidence: Evidence) -> np.ndarray:
    """Of most of the steps, or none: one batch may have no gradient."""
    history = evidence.history
    gone = history.applied & (history.grad_norm == 0) & history.finite_loss & (history.loss != 0)
    return history.step[gone] if 2 * gone.sum() > len(history) else history.step[:0]


FOREIGN: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
    foreign_nonfinite,
    unsampled_underflow,
)
