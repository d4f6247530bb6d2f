"""What is known of one module, wherever it was recorded."""

from __future__ import annotations

import re

from mpcli.diagnose.evidence import Evidence
from mpcli.precision.observe import LOSS
from mpcli.precision.operations import NORMS, REDUCTIONS, SOFTMAXES
from mpcli.records import ReplayedAttention

FP16_OVERFLOW = 65520.0
"""The least magnitude that rounds to infinity in fp16."""
NORM = re.compile(r"(Norm(\d[dD])?|[sS]oft[mM]ax(2d)?)$")


def type_of(evidence: Evidence, module: str) -> str:
    """Class of a module; empty where it is not known."""
    foreign = evidence.foreign
    known = {
        **{row.name: row.type for row in (evidence.plan.modules if evidence.plan else ())},
        **{row.name: row.type for row in (foreign.modules if foreign else ())},
        **{row.module: row.type for row in (evidence.replay.modules if evidence.replay else ())},
    }
    return known.get(module, "")


def is_norm(evidence: Evidence, module: str) -> bool:
    """Whether it is a norm or a softmax: by its class, or by what it computes in half itself."""
    if NORM.search(type_of(evidence, module)):
        return True
    operations = half_operations(evidence, module)
    is_root = bool(operations & {"sqrt", "rsqrt"} and operations & REDUCTIONS)
    return is_root or {"exp", "sum"} <= operations or bool(operations & (NORMS | SOFTMAXES))


def half_operations(evidence: Evidence, module: str) -> frozenset[str]:
    """Of the step that was run again: see `ReplayedModule.half_operations`."""
    rows = evidence.replay.modules if evidence.replay else ()
    return frozenset(name for row in rows if row.module == module for name in row.half_operations)


def exact_max(evidence: Evidence, module: str) -> float:
    """Largest output of a module in fp32; 0 where it is not known."""
    rows = evidence.replay.modules if evidence.replay else ()
    return max((row.exact_output_max or 0.0 for row in rows if row.module == module), default=0.0)


def attentions(evidence: Evidence) -> tuple[ReplayedAttention, ...]:
    """Of the step that was run again."""
    return evidence.replay.attention if evidence.replay else ()


def half_of(evidence: Evidence) -> str | None:
    """The half format that products are computed in; None in fp32."""
    return evidence.compute if evidence.compute in ("fp16", "bf16") else None


def place_of(module: str) -> str:
    """In a sentence."""
    if module == LOSS:
        return "the loss"
    return f"`{module}`" if module else "the model's own forward"
