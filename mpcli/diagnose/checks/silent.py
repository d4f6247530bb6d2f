"""What does harm without a NaN: norms and long sums in half, attention that sees one key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mpcli.diagnose import remedies
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding, FindingId, Suggestion
from mpcli.diagnose.modules import (
    NORM,
    exact_max,
    half_of,
    half_operations,
    is_norm,
    place_of,
    type_of,
)
from mpcli.precision.operations import NORMS, REDUCTIONS, SOFTMAXES
from mpcli.records import Parting, Replay, ReplayedAttention

SATURATED = 0.5
"""Share of an attention's queries that pass no gradient: fp32 rounds 1 - 2^-25 to 1, which needs
logits 17 apart. Attention as it is initialised has none."""
OFF = 0.5
"""Relative difference of an output from fp32 that rounding does not make."""
JUMP = 4.0
"""Times the largest difference before."""
MOST = 0.5
"""Relative error of an output of which little is left."""
_FUSED = frozenset((
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LayerNorm", "GroupNorm"),
    *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "RMSNorm"),
))  # fmt: skip
"""torch's own, by name."""


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
        evidence=attention_numbers(worst),
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
    if replay is None or replay.origin or half_of(evidence) is None:
        return
    parting = _first_off(evidence, replay) or replay.parting
    if parting is None:
        return
    operations = half_operations(evidence, parting.module)
    if not is_norm(evidence, parting.module) and not operations & REDUCTIONS:
        return
    kind: FindingId = "norm-in-half" if is_norm(evidence, parting.module) else "half-reduction"
    first, *others = remedies.fp32_module(evidence, parting.module)
    told = ", ".join(sorted(operations)) or type_of(evidence, parting.module)
    what = "its sums" if kind == "half-reduction" else "a norm or softmax"
    yield Finding(
        id=kind,
        severity="error" if parting.error >= MOST else "warning",
        cause=f"{place_of(parting.module)} computes {what} in {half_of(evidence)} "
        f"({told}), and is {parting.error:.0%} off from fp32, while what "
        "it was given is not",
        layers=(parting.module,),
        phase=parting.phase,
        step=replay.step,
        confidence=0.8,
        evidence={
            "relative error": parting.error,
            "operations": told,
            "largest output in fp32": exact_max(evidence, parting.module),
        },
        suggestion=first,
        alternatives=tuple(others or [remedies.fp32(evidence)]),
    )


def _first_off(evidence: Evidence, replay: Replay) -> Parting | None:
    """A norm or sum in half that is the first module, in forward, to return what is far off.

    `Replay.parting` leaves out modules that make small what was large, as rounding what they were
    given might; a norm makes the rounding small with it.
    """
    worst = 0.0
    for row in replay.modules:
        error = row.output.error if row.output else 0.0
        if error > OFF:
            computes = set(row.half_operations) & (REDUCTIONS | NORMS | SOFTMAXES)
            if computes and error > JUMP * worst:
                return Parting(module=row.module, call=row.call, phase="forward", error=error)
            return None
        worst = max(worst, error)
    return None


def norms_in_half(evidence: Evidence) -> Iterator[Finding]:
    """Norms written by hand that compute in half, and do no harm so far.

    torch's own norms are not meant: their kernels compute statistics in fp32 whatever the type.
    """
    half = half_of(evidence)
    if half is None:
        return
    if evidence.replay:
        if evidence.replay.origin or evidence.replay.parting:
            return
        names = [
            row.module
            for row in evidence.replay.modules
            if NORM.search(row.type) and set(row.half_operations) & REDUCTIONS
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


SILENT: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (attention, lossy, norms_in_half)


def attention_numbers(seen: ReplayedAttention) -> dict[str, float | str | bool | None]:
    """As evidence."""
    return {
        "largest query-key product in fp32": seen.product_max,
        "largest logit": seen.logit_max,
        "entropy (1: all keys alike)": seen.entropy,
        "share of queries without a gradient": seen.saturated,
    }


def _classes(evidence: Evidence, names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(type_of(evidence, name) for name in names))


def _foreign_norms(evidence: Evidence) -> Iterator[str]:
    foreign = evidence.foreign
    for module in foreign.modules if foreign else ():
        if NORM.search(module.type) and module.type not in _FUSED:
            yield module.name


def _computed(evidence: Evidence, module: str) -> list[str]:
    types = evidence.facts.run.types.get(module) if evidence.facts.run else None
    return types.computed.split("+") if types else []


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
