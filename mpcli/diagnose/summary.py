"""What was found, in one sentence: causes where there are any, else facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpcli.diagnose.facts import Facts
from mpcli.diagnose.finding import Finding
from mpcli.records import Replay


def verdict(evidence: Facts, replay: Replay | None = None, causes: Sequence[Finding] = ()) -> str:
    """The causes, of which information alone is none; then what was seen."""
    trouble = [cause for cause in causes if cause.severity != "info"]
    said = [f"{cause.id}: {cause.cause.rstrip('.')}" for cause in trouble] or [
        without_trouble(evidence, replay)
    ]
    return "; ".join([*said, *filter(None, [seen(evidence, replay)])])


def without_trouble(evidence: Facts, replay: Replay | None = None) -> str:
    """What there is to say where nothing is wrong."""
    run = evidence.run
    if run is None or replay or evidence.weights or evidence.not_read:
        return "no problem found"
    recorded = run.steps or run.sampled or run.flights or run.events or run.unread
    return "no problem found" if recorded else "nothing was recorded"


def seen(evidence: Facts, replay: Replay | None = None) -> str:
    """Facts without a cause."""
    return "; ".join([*_facts(evidence), *(_replayed(replay) if replay else ())])


def _replayed(replay: Replay) -> Iterator[str]:
    if origin := replay.origin:
        place = f"{origin.module or 'the model'}, {origin.phase}"
        yield f"step {replay.step} again: {origin.value} made in {place}"
    elif parting := replay.parting:
        place = f"{parting.module or 'the model'}, {parting.phase}"
        yield f"step {replay.step} again: parts from fp32 in {place}"
    else:
        yield f"step {replay.step} again: no module parts from fp32 ({_largest(replay)})"


def _largest(replay: Replay) -> str:
    """Of a step that has more micro-batches, one was looked at."""
    errors = {
        seen.error: f"{whose} of {row.module or 'the model'}"
        for row in replay.modules
        for whose, seen in (("output", row.output), ("gradient", row.grad_output))
        if seen
    }
    beside = f"at most {max(errors):.2%} off, in the {errors[max(errors)]}" if errors else "no rows"
    many = replay.micro_batches > 1
    return f"{beside}; one micro-batch of {replay.micro_batches}" if many else beside


def _facts(evidence: Facts) -> Iterator[str]:
    if run := evidence.run:
        if run.result:
            yield run.result.status
        yield f"{run.skipped} of {run.steps} steps skipped"
        for file, number in run.unread.items():
            yield f"{number} rows of {file} cannot be read"
        if row := run.first_nonfinite:
            yield f"losses not finite: {run.nonfinite_losses}, the first at step {row.step}"
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
