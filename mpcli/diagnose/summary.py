"""The evidence in one sentence."""

from __future__ import annotations

from collections.abc import Iterator

from mpcli.diagnose.evidence import Evidence


def verdict(evidence: Evidence) -> str:
    """What was found, in a sentence: facts, not causes."""
    return "; ".join(_facts(evidence)) or "nothing was found that has numbers"


def _facts(evidence: Evidence) -> Iterator[str]:
    if run := evidence.run:
        if run.result:
            yield run.result.status
        yield f"{run.skipped} of {run.steps} steps skipped"
        if row := run.first_nonfinite:
            yield f"{run.nonfinite_losses} losses not finite, the first at step {row.step}"
    if evidence.trainer and (logged := evidence.trainer.first_nonfinite):
        yield f"loss or gradient norm is not finite, first logged at step {logged.step}"
    if evidence.weights:
        yield f"weights: {evidence.weights.verdict}"
    for state in evidence.optimizer.states if evidence.optimizer else ():
        if state.nonfinite:
            yield f"optimizer: NaN or infinity in `{state.key}` of {len(state.nonfinite)} tensors"
