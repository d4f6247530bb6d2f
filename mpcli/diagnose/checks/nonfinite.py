"""Where a NaN or an infinity was born: batch, forward, backward, and which kind of operation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from mpcli.diagnose import remedies
from mpcli.diagnose.born import Born, born
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding, FindingId, Severity, Suggestion
from mpcli.precision.observe import LOSS
from mpcli.precision.operations import NORMS, REDUCTIONS, SOFTMAXES
from mpcli.precision.trace import WEIGHTS
from mpcli.records import ReplayedAttention, ReplayedInput

FP16_MAX = 65504.0
FP16_OVERFLOW = 65520.0
"""The least magnitude that rounds to infinity in fp16."""
OUT_OF_RANGE = 2.0**10
"""A batch whose largest value is so many times another one's is no such batch: between the largest
of a few thousand values with a normal distribution and of as many others there is a factor below 2,
and of log-normal ones (sigma 1) below 2^5."""
SATURATED = 0.5
"""Share of an attention's queries that pass no gradient: fp32 rounds 1 - 2^-25 to 1, which needs
logits 17 apart. Attention as it is initialised has none."""
MOST = 0.5
"""Relative error of an output of which little is left."""
PRODUCTS = frozenset({"bmm", "baddbmm", "mm", "addmm", "matmul", "mul", "div", "einsum"})
"""Operations that make the logits of attention out of queries and keys."""
_NORM = re.compile(r"Norm(\d[dD])?$")
_LABELS = re.compile(r"Target -?\d+ is out of bounds|index out of range in self|device-side assert")


def nonfinite(evidence: Evidence) -> Iterator[Finding]:
    """The first NaN or infinity of the step: one event, and so one finding at most.

    Not told here: weights that were not finite before the step, and gradients that a lower loss
    scale keeps finite.
    """
    found = born(evidence)
    if found is None:
        yield from _lost_in_forward(evidence)
        return
    strange = _out_of_range(evidence)
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


def attention(evidence: Evidence) -> Iterator[Finding]:
    """Attention whose logits are so large that its softmax picks one key, in fp32 too."""
    replay = evidence.replay
    if replay is None or replay.origin is not None:
        return
    steep = [seen for seen in replay.attention if seen.saturated >= SATURATED]
    if not steep:
        return
    steep.sort(key=lambda seen: -seen.saturated)
    worst = steep[0]
    yield Finding(
        id="attention-logits",
        severity="warning",
        cause=f"the attention of `{worst.module}` has logits up to {worst.logit_max:,.0f}: "
        f"{worst.saturated:.0%} of its queries look at one key alone, and get no gradient, in fp32 "
        "too",
        layers=tuple(dict.fromkeys(seen.module for seen in steep)),
        phase="forward",
        step=replay.step,
        confidence=0.9,
        evidence=_attention_numbers(worst),
        suggestion=remedies.learning_rate(evidence, 0.1),
        alternatives=(
            Suggestion(
                what="normalise queries and keys before their product",
                code="q, k = layer_norm(q), layer_norm(k)",
            ),
        ),
    )


def lossy(evidence: Evidence) -> Iterator[Finding]:
    """A norm, or a long sum, in half precision, where the run parts from fp32 without overflow."""
    replay = evidence.replay
    if replay is None or replay.origin or not replay.parting or _half(evidence) is None:
        return
    parting = replay.parting
    row = next((row for row in replay.modules if row.module == parting.module), None)
    if row is None or not row.half_operations:
        return
    kind = _half_kind(evidence, parting.module, row.half_operations)
    if kind is None:
        return
    what = "its sums" if kind == "half-reduction" else "the norm"
    yield Finding(
        id=kind,
        severity="error" if parting.error >= MOST else "warning",
        cause=f"`{parting.module}` computes {what} in {_half(evidence)} "
        f"({', '.join(row.half_operations)}), and is {parting.error:.0%} off from fp32, while what "
        "it was given is not",
        layers=(parting.module,),
        phase=parting.phase,
        step=replay.step,
        confidence=0.8,
        evidence={
            "relative error": parting.error,
            "operations": ", ".join(row.half_operations),
            "largest output in fp32": row.exact_output_max,
        },
        suggestion=remedies.fp32_layers(evidence, (parting.module,)),
        alternatives=(remedies.fp32(evidence),),
    )


def norms_in_half(evidence: Evidence) -> Iterator[Finding]:
    """Norms written by hand that compute in half, and do no harm so far.

    torch's own norms are not meant: their kernels compute statistics in fp32 whatever the type.
    """
    half = _half(evidence)
    if half is None:
        return
    if evidence.replay:
        if evidence.replay.origin or evidence.replay.parting:
            return
        names = [
            row.module
            for row in evidence.replay.modules
            if _NORM.search(row.type) and set(row.half_operations) & REDUCTIONS
        ]
    else:
        names = [name for name in _foreign_norms(evidence) if half in _computed(evidence, name)]
    if names := list(dict.fromkeys(names)):
        yield Finding(
            id="norm-in-half",
            severity="info",
            cause=f"`{names[0]}`{_more(names)} computes a norm in {half} that is written by hand: "
            "its squares overflow in fp16 above 256, and lose what is small",
            layers=tuple(names),
            phase="forward",
            confidence=0.9 if evidence.replay else 0.6,
            evidence={"norms": len(names), "computed in": half},
            suggestion=remedies.fp32_layers(evidence, _classes(evidence, names)),
        )


NONFINITE: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
    nonfinite, labels, attention, lossy, norms_in_half,
)  # fmt: skip


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
        if found.origin.value == "inf" and found.in_fp32 and not found.has_pole:
            return (remedies.learning_rate(evidence, 0.1),)
        return (remedies.guarded(found.origin.module, _operation(found)),)
    wide = remedies.bf16(evidence)
    module = found.origin.module
    if module in ("", LOSS):
        return wide, remedies.fp32(evidence)
    layer = remedies.fp32_layers(evidence, _sensitive(evidence, found))
    largest = _exact_max(evidence, module)
    # An island returns to the type of its neighbours: what is too large for fp16 is so again.
    is_too_large = found.origin.phase == "forward" and largest >= FP16_OVERFLOW
    return (wide, layer) if is_too_large else (layer, wide)


def _by_operation(evidence: Evidence, found: Born) -> Finding:
    origin = found.origin
    is_backward = origin.phase == "backward"
    made = f"the gradient of `{_operation(found)}`" if is_backward else f"`{_operation(found)}`"
    if origin.value == "inf" and found.in_fp32 and not found.has_pole:
        why = "past the range of fp32 itself: look for what makes numbers grow before that"
    elif found.in_fp32:
        why = "in fp32 too: neither another precision nor a loss scale helps"
    else:
        why = "as no overflow does: neither another precision nor a loss scale helps"
    return Finding(
        id="backward-nonfinite" if is_backward else "forward-nonfinite",
        severity=severity_of(evidence),
        cause=f"in {_place(origin.module)} {made} makes {origin.value} out of finite numbers, "
        f"{why}",
        layers=(origin.module,),
        phase=origin.phase,
        step=found.step,
        confidence=found.confidence,
        evidence=_numbers(evidence, found),
        suggestion=mending(evidence, found)[0],
    )


def _by_format(evidence: Evidence, found: Born) -> Finding:
    origin = found.origin
    first, *others = mending(evidence, found)
    half = _half(evidence) or evidence.compute
    made = f"`{_operation(found)}` in " if origin.operation else ""
    given = f"{made}{_place(origin.module)}"
    largest = _exact_max(evidence, origin.module)
    beside = f", where fp32 has at most {largest:,.4g}" if largest else ""
    over = f"more than {half} can hold (65,504)" if half == "fp16" else f"{origin.value} in {half}"
    kind = _kind(evidence, found)
    causes = {
        "forward-overflow": f"the output of {given} is {over}{beside}",
        "half-reduction": f"the sum {given} is {over}{beside}",
        "norm-in-half": f"the norm {_place(origin.module)} computes in {half}, and "
        f"`{_operation(found)}` in it is {over}{beside}",
        "attention-logits": f"the product of queries and keys in {_place(origin.module)} is {over}",
        "backward-nonfinite": f"the gradient of {given} is {over} at any loss scale, and finite in "
        "fp32",
    }
    logits = next((s for s in _attentions(evidence) if s.module == origin.module), None)
    more = _attention_numbers(logits) if kind == "attention-logits" and logits else {}
    return Finding(
        id=kind,
        severity=severity_of(evidence),
        cause=causes[kind],
        layers=(origin.module,),
        phase=origin.phase,
        step=found.step,
        confidence=found.confidence if found.in_fp32 is False else 0.7 * found.confidence,
        evidence=_numbers(evidence, found) | more,
        suggestion=first,
        alternatives=tuple(others),
    )


def _kind(evidence: Evidence, found: Born) -> FindingId:
    """Of what a half format could not hold."""
    origin = found.origin
    if _NORM.search(_type_of(evidence, origin.module)):
        return "norm-in-half"
    if origin.phase == "backward":
        return "backward-nonfinite"
    if origin.operation in REDUCTIONS:
        return "half-reduction"
    is_product = origin.operation in PRODUCTS
    logits = (s.product_max for s in _attentions(evidence) if s.module == origin.module)
    if is_product and max(logits, default=0.0) >= FP16_OVERFLOW:
        return "attention-logits"
    return "forward-overflow"


def _half_kind(evidence: Evidence, module: str, operations: Iterable[str]) -> FindingId | None:
    if _NORM.search(_type_of(evidence, module)) or set(operations) & (NORMS | SOFTMAXES):
        return "norm-in-half"
    return "half-reduction" if set(operations) & REDUCTIONS else None


def _bad_batch(evidence: Evidence, found: Born, strange: ReplayedInput | None) -> Finding:
    if strange:
        cause = (
            f"`{strange.name}` of the batch of step {found.step} has values up to "
            f"{strange.max:.3g}, where another batch has {strange.usual_max:.3g} at most"
        )
        numbers = {"largest input": strange.max, "usual largest input": strange.usual_max}
    else:
        cause = f"the batch of step {found.step} itself holds {found.origin.value}"
        numbers = {}
    inputs = evidence.replay.inputs if evidence.replay else ()
    numbers |= {
        "NaN in the batch": sum(row.nan for row in inputs) if inputs else None,
        "infinities in the batch": sum(row.inf for row in inputs) if inputs else None,
    }
    return Finding(
        id="bad-batch",
        severity=severity_of(evidence),
        cause=cause,
        phase="input",
        step=found.step,
        confidence=0.9 * found.confidence if strange else found.confidence,
        evidence={"value": found.origin.value, "loss scale": found.scale, **numbers},
        suggestion=remedies.leave_out_batch(evidence, found.step),
    )


def _out_of_range(evidence: Evidence) -> ReplayedInput | None:
    """The tensor of the replayed batch that is farthest from what such tensors are."""
    inputs = evidence.replay.inputs if evidence.replay else ()
    far = [row for row in inputs if row.usual_max and row.max > OUT_OF_RANGE * row.usual_max]
    return max(far, key=lambda row: row.max / (row.usual_max or 1.0), default=None)


def _lost_in_forward(evidence: Evidence) -> Iterator[Finding]:
    """A loss that is not a number says that forward made it, and no more."""
    history = evidence.history
    if evidence.replay or history.finite_loss.all():
        return
    first = int((~history.finite_loss).argmax())
    half = _half(evidence) == "fp16"
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
        "largest output in fp32": _exact_max(evidence, found.origin.module) or None,
    }


def _attention_numbers(seen: ReplayedAttention) -> dict[str, float | str | bool | None]:
    return {
        "largest query-key product in fp32": seen.product_max,
        "largest logit": seen.logit_max,
        "entropy (1: all keys alike)": seen.entropy,
        "share of queries without a gradient": seen.saturated,
    }


def _attentions(evidence: Evidence) -> tuple[ReplayedAttention, ...]:
    return evidence.replay.attention if evidence.replay else ()


def _exact_max(evidence: Evidence, module: str) -> float:
    """Largest output of a module in fp32; 0 where it is not known."""
    rows = evidence.replay.modules if evidence.replay else ()
    return max((row.exact_output_max or 0.0 for row in rows if row.module == module), default=0.0)


def _half(evidence: Evidence) -> str | None:
    return evidence.compute if evidence.compute in ("fp16", "bf16") else None


def _type_of(evidence: Evidence, module: str) -> str:
    """Class of a module; empty where it is not known."""
    foreign = evidence.facts.run.foreign if evidence.facts.run else None
    known = {
        **{row.name: row.type for row in (evidence.plan.modules if evidence.plan else ())},
        **{row.name: row.type for row in (foreign.modules if foreign else ())},
        **{row.module: row.type for row in (evidence.replay.modules if evidence.replay else ())},
    }
    return known.get(module, "")


def _sensitive(evidence: Evidence, found: Born) -> tuple[str, ...]:
    """What to compute in fp32: of a norm all of its kind, since the next one would be next."""
    name = _type_of(evidence, found.origin.module)
    return (name,) if _NORM.search(name) else (found.origin.module,)


def _classes(evidence: Evidence, names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_type_of(evidence, name) for name in names))


def _foreign_norms(evidence: Evidence) -> Iterator[str]:
    foreign = evidence.facts.run.foreign if evidence.facts.run else None
    for module in foreign.modules if foreign else ():
        if _NORM.search(module.type) and module.type not in _FUSED:
            yield module.name


_FUSED = frozenset((
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LayerNorm", "GroupNorm"),
    *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "RMSNorm"),
))  # fmt: skip
"""torch's own, by name."""


def _computed(evidence: Evidence, module: str) -> list[str]:
    types = evidence.facts.run.types.get(module) if evidence.facts.run else None
    return types.computed.split("+") if types else []


def _operation(found: Born) -> str:
    name = found.origin.operation or "an operation"
    return re.sub(r"Backward\d*$", "", name).lower() if "Backward" in name else name


def _place(module: str) -> str:
    if module == LOSS:
        return "the loss"
    return f"`{module}`" if module else "the model's own forward"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
