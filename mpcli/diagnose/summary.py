"""The evidence in one sentence."""

from __future__ import annotations

from collections.abc import Iterator

from mpcli.diagnose.facts import Facts


def verdict(evidence: Facts) -> str:
    """What was found, in a sentence: facts, not causes."""
    return "; ".join(_facts(evidence)) or "it holds no numbers"


def _facts(evidence: Facts) -> Iterator[str]:
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
    if evidence.optimizer:
        states = [state for state in evidence.optimizer.states if state.nonfinite]
        found = [f"NaN or infinity in `{state.key}` of {len(state.nonfinite)}" for state in states]
        yield f"optimizer: {', '.join(found) or 'all of its state is finite'}"
    if evidence.scaler:
        yield f"loss scale: {evidence.scaler.scale:g}"
