"""Where a NaN or an infinity was born: batch, forward, backward, and which kind of operation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from mpcli.diagnose import remedies
from mpcli.diagnose.born import Born, born
from mpcli.diagnose.checks.silent import attention_numbers
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding, FindingId, Severity, Suggestion
from mpcli.diagnose.modules import (
    FP16_OVERFLOW,
    NORM,
    attentions,
    exact_max,
    half_of,
    is_norm,
    place_of,
    type_of,
)
from mpcli.precision.observe import LOSS, PRODUCTS
from mpcli.precision.operations import REDUCTIONS
from mpcli.precision.trace import WEIGHTS
from mpcli.records import NonFiniteOrigin

OUT_OF_RANGE = 2.0**10
"""A batch whose largest value is so many times another one's is no such batch: between the largest
of a few thousand values with a normal distribution and of as many others there is a factor below 2,
and of log-normal ones (sigma 1) below 2^5."""
HUGE = 2.0**63
"""Of sums of squares of such numbers fp32 makes infinity, which is at 2^128."""
CAST = "_to_copy"
LOGITS = frozenset({"bmm", "baddbmm", "mm", "mul", "div"})
"""Operations that make the logits of attention out of queries and keys."""
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_LABELS = re.compile(r"Target -?\d+ is out of bounds|index out of range in self|device-side assert")


def nonfinite(evidence: Evidence) -> Iterator[Finding]:
    """The first NaN or infinity of the step: one event, and so one finding at most.

    Not told here: weights that were not finite before the step, and gradients that a lower loss
    scale keeps finite.
    """
    run = evidence.facts.run
    if run and run.foreign and any(flight.origin for flight in run.flights):
        return  # `foreign_nonfinite` knows how that was found
    found = born(evidence)
    if found is None:
        yield from _lost_in_forward(evidence)
        return
    strange = _out_of_range(evidence, found)
    if found.origin.phase == "input" or strange:
        yield _bad_batch(evidence, found, strange)
    elif found.origin.operation != WEIGHTS and not found.is_of_scale:
        yield (
            _by_operation(evidence, found) if found.is_of_operation else _by_format(evidence, found)
        )


def labels(evidence: Evidence) -> Iterator[Finding]:
    """A run that ended since a label, or a token, is none of those that the model knows."""
    result = evidence.facts.run.result if evidence.facts.run else None
    reasons = (
        [result.reason or "", *(told["message"] for told in result.problems)] if result else []
    )
    said = next(filter(None, map(_LABELS.search, reasons)), None)
    if said is None or result is None:
        return
    yield Finding(
        id="bad-batch",
        severity="error",
        cause="the batch holds a label, or a token, that the model has no number for: "
        f"torch said `{said[0]}`",
        phase="input",
        step=result.steps_attempted + 1,
        confidence=0.6 if "device-side" in said[0] else 1.0,
        evidence={"message": said[0], "steps attempted": result.steps_attempted},
        suggestion=Suggestion(
            what="make labels run from 0 to the number of classes - 1, or give the model more",
            code="assert 0 <= labels.min() and labels.max() < num_classes",
        ),
    )


NONFINITE: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (nonfinite, labels)


def severity_of(evidence: Evidence) -> Severity:
    """`error` where it was the end of the run, or still goes on; `warning` where it went by."""
    result = evidence.facts.run.result if evidence.facts.run else None
    failed = result is not None and result.status in ("diverged", "failed")
    history = evidence.history
    goes_on = len(history) > 0 and bool(history.skipped[-1] or not history.finite_loss[-1])
    return "error" if failed or goes_on else "warning"


def mending(evidence: Evidence, found: Born) -> tuple[Suggestion, ...]:
    """What keeps a step finite, the best first."""
    if found.is_of_operation:
        if _is_growth(evidence, found):
            return (remedies.learning_rate(evidence, 0.1),)
        return (remedies.guarded(found.origin.module, _operation(found)),)
    module = found.origin.module
    if module in ("", LOSS):
        return tuple(remedies.fp32_module(evidence, module))
    layer = remedies.fp32_layers(evidence, _sensitive(evidence, found))
    largest = exact_max(evidence, module)
    # An island returns to the type of its neighbours: what is too large for fp16 is so again.
    is_too_large = found.origin.phase == "forward" and largest >= FP16_OVERFLOW
    wide = remedies.wide(evidence)[:1]
    return (*wide, layer) if is_too_large else (layer, *wide)


def _by_operation(evidence: Evidence, found: Born) -> Finding:
    origin = found.origin
    is_backward = origin.phase == "backward"
    made = f"the gradient of `{_operation(found)}`" if is_backward else f"`{_operation(found)}`"
    if _is_growth(evidence, found):
        why = "past the range of fp32 itself: look for what makes numbers grow before that"
    elif found.in_fp32:
        why = "in fp32 too: neither another precision nor a loss scale helps"
    else:
        why = "as no overflow does: neither another precision nor a loss scale helps"
    return Finding(
        id="backward-nonfinite" if is_backward else "forward-nonfinite",
        severity=severity_of(evidence),
        cause=f"in {place_of(origin.module)} {made} makes {origin.value} out of finite numbers, "
        f"{why}",
        layers=(origin.module,),
        phase=origin.phase,
        step=found.step,
        confidence=found.confidence,
        evidence=_numbers(evidence, found),
        suggestion=mending(evidence, found)[0],
    )


def _is_growth(evidence: Evidence, found: Born) -> bool:
    """Whether numbers have left fp32's range, or will when they are squared."""
    rows = evidence.replay.modules if evidence.replay else ()
    sizes = [row.exact_output_max or 0.0 for row in rows]
    is_huge = max(filter(math.isfinite, sizes), default=0.0) >= HUGE
    is_plain = found.origin.value == "inf" and not found.has_pole
    return bool(found.in_fp32) and (is_plain or is_huge)


def _returned_too_large(evidence: Evidence, origin: NonFiniteOrigin) -> str | None:
    """The module that returned, in fp32, what another one could not cast to fp16."""
    if evidence.replay is None or origin.operation != CAST or origin.phase != "forward":
        return None
    rows = evidence.replay.modules
    large = [row.module for row in rows if FP16_OVERFLOW <= (row.output_max or 0.0) < math.inf]
    return large[0] if large else None


def _by_format(evidence: Evidence, found: Born) -> Finding:
    if module := _returned_too_large(evidence, found.origin):
        origin = found.origin.model_copy(update={"module": module, "operation": None})
        found = dataclasses.replace(found, origin=origin)
    origin = found.origin
    first, *others = mending(evidence, found)
    half = half_of(evidence) or evidence.compute
    made = f"`{_operation(found)}` in " if origin.operation else ""
    given = f"{made}{place_of(origin.module)}"
    largest = exact_max(evidence, origin.module)
    beside = f", where fp32 has at most {largest:,.4g}" if largest else ""
    over = f"more than {half} can hold (65,504)" if half == "fp16" else f"{origin.value} in {half}"
    kind = _kind(evidence, found)
    summed = "the sum" if origin.operation in REDUCTIONS else "a sum, in"
    causes = {
        "forward-overflow": f"the output of {given} is {over}{beside}",
        "half-reduction": f"{summed} {given} is {over}{beside}",
        "norm-in-half": f"{place_of(origin.module)} computes a norm or softmax in {half}, and "
        f"`{_operation(found)}` in it is {over}{beside}",
        "attention-logits": "the product of queries and keys in "
        f"{place_of(origin.module)} is {over}",
        "backward-nonfinite": f"the gradient of {given} is {over} at any loss scale, and finite in "
        "fp32",
    }
    logits = next((s for s in attentions(evidence) if s.module == origin.module), None)
    more = attention_numbers(logits) if kind == "attention-logits" and logits else {}
    return Finding(
        id=kind,
        severity=severity_of(evidence),
        cause=causes[kind],
        layers=(origin.module,),
        phase=origin.phase,
        step=found.step,
        confidence=found.confidence if found.in_fp32 is False else round(0.7 * found.confidence, 2),
        evidence=_numbers(evidence, found) | more,
        suggestion=first,
        alternatives=tuple(others),
    )


def _kind(evidence: Evidence, found: Born) -> FindingId:
    """Of what a half format could not hold."""
    origin = found.origin
    if origin.phase == "backward":
        is_of_norm = NORM.search(type_of(evidence, origin.module))
        return "norm-in-half" if is_of_norm else "backward-nonfinite"
    if origin.operation in LOGITS and _has_large_logits(evidence, origin):
        return "attention-logits"
    if is_norm(evidence, origin.module) and origin.operation not in PRODUCTS:
        return "norm-in-half"
    is_of_sum = origin.operation in REDUCTIONS or origin.elements == 1
    return "half-reduction" if is_of_sum else "forward-overflow"


def _has_large_logits(evidence: Evidence, origin: NonFiniteOrigin) -> bool:
    """Without a replay: the other product of an attention, with probabilities, is bounded."""
    if evidence.replay:
        logits = (s.product_max for s in attentions(evidence) if s.module == origin.module)
        return max(logits, default=0.0) >= FP16_OVERFLOW
    name = f"{origin.module} {type_of(evidence, origin.module)}"
    return origin.operation in ("bmm", "baddbmm") and bool(_ATTENTION.search(name))


def _bad_batch(evidence: Evidence, found: Born, strange: _Strange | None) -> Finding:
    if strange:
        cause = (
            f"{strange.what} of the batch of step {found.step} has values up to "
            f"{strange.largest:.3g}, {strange.beside}"
        )
        numbers: dict[str, float | str | bool | None] = {
            "largest input": strange.largest,
            "usual largest input": strange.usual,
        }
    else:
        cause = f"the batch of step {found.step} itself holds {found.origin.value}"
        inputs = evidence.replay.inputs if evidence.replay else ()
        numbers = {
            "NaN in the batch": sum(row.nan for row in inputs) if inputs else None,
            "infinities in the batch": sum(row.inf for row in inputs) if inputs else None,
        }
    return Finding(
        id="bad-batch",
        severity=severity_of(evidence),
        cause=cause,
        phase="input",
        step=found.step,
        confidence=round(0.9 * found.confidence, 2) if strange else found.confidence,
        evidence={"value": found.origin.value, "loss scale": found.scale, **numbers},
        suggestion=remedies.leave_out_batch(evidence, found.step),
    )


class _Strange(NamedTuple):
    """A tensor of a batch whose values are out of range."""

    what: str
    largest: float
    usual: float | None
    beside: str


def _out_of_range(evidence: Evidence, found: Born) -> _Strange | None:
    """What is far from another batch's values, or cannot be cast to fp16 as it is."""
    for row in evidence.replay.inputs if evidence.replay else ():
        if row.usual_max and row.max > OUT_OF_RANGE * row.usual_max:
            beside = f"where another batch has {row.usual_max:.3g} at most"
            return _Strange(f"`{row.name}`", row.max, row.usual_max, beside)
    if found.origin.operation != CAST or evidence.compute != "fp16":
        return None
    flights = evidence.facts.run.flights if evidence.facts.run else ()
    known = {row.name: row.max for row in (evidence.replay.inputs if evidence.replay else ())}
    known |= next((dict(f.largest) for f in flights if f.step == found.step), {})
    name = max(known, key=lambda key: known[key], default=None)
    if name is None or known[name] < FP16_OVERFLOW:
        return None
    return _Strange(f"`{name}`", known[name], None, "which fp16 cannot hold (65,504)")


def _lost_in_forward(evidence: Evidence) -> Iterator[Finding]:
    """A loss that is not a number says that forward made it, and no more."""
    history = evidence.history
    if evidence.replay or history.finite_loss.all():
        return
    first = int((~history.finite_loss).argmax())
    half = half_of(evidence) == "fp16"
    yield Finding(
        id="forward-overflow" if half else "forward-nonfinite",
        severity=severity_of(evidence),
        cause=f"the loss itself is {history.loss[first]:g} from step {history.step[first]} on, so "
        "the trouble begins in forward (which layer makes it is not known without a replay)",
        phase="forward",
        step=int(history.step[first]),
        confidence=0.3,
        evidence={
            "loss": float(history.loss[first]),
            "losses not finite": int((~history.finite_loss).sum()),
        },
        suggestion=remedies.bf16(evidence) if half else None,
    )


def _numbers(evidence: Evidence, found: Born) -> dict[str, float | str | bool | None]:
    return {
        "value": found.origin.value,
        "operation": found.origin.operation,
        "loss scale": found.scale,
        "also in fp32": found.in_fp32,
        "also at a loss scale of 1": found.at_scale_1,
        "largest output in fp32": exact_max(evidence, found.origin.module) or None,
    }


def _sensitive(evidence: Evidence, found: Born) -> tuple[str, ...]:
    """What to compute in fp32: of a norm all of its kind, since the next one would be next."""
    module = found.origin.module
    return (type_of(evidence, module) if is_norm(evidence, module) else module,)


def _operation(found: Born) -> str:
    name = found.origin.operation or "an operation"
    return re.sub(r"Backward\d*$", "", name).lower() if "Backward" in name else name
