"""How far from trouble a run is: what a healthy one gets instead of a finding."""

from __future__ import annotations

import math

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.modules import FP16_OVERFLOW
from mpcli.records import LayerRecord


def margins(evidence: Evidence) -> dict[str, float | None]:
    """Bits to fp16's overflow, share of gradients that fp16 flushed, share of steps skipped.

    Headroom is log2(65520 / max) over all sampled steps: of outputs, of gradients times the loss
    scale, and of the weights as they are now. `flushed_share` is of the gradients of parameters in
    the step that was run again, the mean over modules; null where there was none. All are null
    where nothing is known.
    """
    rows = [row for sample in evidence.samples for row in sample.rows]
    backward = [row for row in rows if row.tensor in ("grad_output", "grad")]
    weights = evidence.facts.weights.total.headroom_bits if evidence.facts.weights else None
    history = evidence.history
    return {
        "forward_headroom_bits": _headroom([row for row in rows if row.tensor == "output"]),
        "gradient_headroom_bits": _headroom(backward),
        "weight_headroom_bits": weights,
        "flushed_share": _flushed(evidence),
        "skip_rate": float(history.skipped.mean()) if len(history) else None,
    }


def _headroom(rows: list[LayerRecord]) -> float | None:
    largest = max((row.max for row in rows if 0 < row.max < math.inf), default=None)
    return math.log2(FP16_OVERFLOW) - math.log2(largest) if largest else None


def _flushed(evidence: Evidence) -> float | None:
    if evidence.replay is None:
        return None
    shares = [row.parameter_grad.flushed for row in evidence.replay.modules if row.parameter_grad]
    return sum(shares) / len(shares) if shares else None
