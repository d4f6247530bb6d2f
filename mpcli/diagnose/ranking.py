"""Causes before their consequences: the earliest abnormal event wins."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mpcli.diagnose.finding import Finding, FindingId

_NONFINITE: frozenset[FindingId] = frozenset((
    *("scale-collapse", "skip-storm", "scale-too-high", "backward-nonfinite", "forward-overflow"),
    *("bad-checkpoint", "optimizer-state-corrupted", "batchnorm-stats", "forward-nonfinite"),
))  # fmt: skip
"""What values that are not finite lead to."""

_GROWTH: frozenset[FindingId] = _NONFINITE | {
    *("exploding-gradients", "attention-logits", "weights-exceed-fp16"),
}  # fmt: skip
"""What training that runs away leads to."""

EXPLAINS: dict[FindingId, frozenset[FindingId]] = {
    "bad-batch": _GROWTH,
    "bad-checkpoint": _NONFINITE,
    "missing-unscale": _GROWTH | {"learning-rate", "lost-updates"},
    "clip-before-unscale": _GROWTH | {"learning-rate", "vanishing-gradients"},
    "accumulation": _GROWTH | {"learning-rate", "optimizer-state-corrupted"},
    "learning-rate": _GROWTH,
    "exploding-gradients": _GROWTH - {"exploding-gradients"},
    "adam-eps": _GROWTH | {"lost-updates", "learning-rate"},
    "attention-logits": _NONFINITE | {"half-reduction", "norm-in-half"},
    "half-reduction": _NONFINITE | {"norm-in-half"},
    "norm-in-half": _NONFINITE,
    "weights-exceed-fp16": _NONFINITE | {"bad-checkpoint"},
    "batchnorm-stats": _NONFINITE - {"batchnorm-stats"},
    "forward-overflow": _NONFINITE - {"forward-overflow"},
    "backward-nonfinite": _NONFINITE
    - {"backward-nonfinite", "forward-overflow", "forward-nonfinite"},
    "scale-too-high": frozenset({"skip-storm", "backward-nonfinite", "scale-collapse"}),
    # Of a scale that falls and falls, the operation behind it is what the finding tells.
    "scale-collapse": frozenset({"skip-storm", "underflow", "forward-nonfinite"}),
    "forward-nonfinite": _NONFINITE - {"forward-nonfinite", "scale-collapse"},
    "underflow": frozenset({"vanishing-gradients", "lost-updates"}),
    "skip-storm": frozenset({"scale-collapse"}),
    "optimizer-state-corrupted": _NONFINITE | {"lost-updates", "learning-rate"},
    "lost-updates": frozenset({"vanishing-gradients", "learning-rate"}),
}
"""What each finding is enough to explain, when it comes first or at the same step."""

_ORDER: tuple[FindingId, ...] = tuple(EXPLAINS)
_SEVERITY = {"error": 0, "warning": 1, "info": 2}


def ranked(found: Iterable[Finding]) -> list[Finding]:
    """Causes, the most important first, each with its consequences.

    A finding is a consequence of another one that explains it (`EXPLAINS`) and is not seen later.
    Of two that explain each other the one seen first is the cause; at the same step the one that
    stands first in `EXPLAINS`, which lists causes from the outside in.
    """
    left = sorted(found, key=_precedence)
    causes: list[Finding] = []
    while left:
        cause = left.pop(0)
        explained = EXPLAINS.get(cause.id, frozenset())
        follow = [f for f in left if f.id in explained and _when(f) >= _when(cause)]
        left = [f for f in left if f not in follow]
        causes.append(cause.model_copy(update={"consequences": tuple(follow)}))
    return sorted(causes, key=lambda f: (_SEVERITY[f.severity], _when(f), -f.confidence))


def _precedence(finding: Finding) -> tuple[float | str, ...]:
    """The same for equal findings alone: the order of the checks is of no matter."""
    place = _ORDER.index(finding.id) if finding.id in _ORDER else len(_ORDER)
    is_info = _SEVERITY[finding.severity] == 2
    return is_info, _when(finding), place, -finding.confidence, finding.id, finding.cause


def _when(finding: Finding) -> float:
    """Without a step: true of the whole run, so before everything that happens in it."""
    return -math.inf if finding.step is None else finding.step
