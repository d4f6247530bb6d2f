"""What is stored: weights, optimizer state, statistics, checkpoints; and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mpcli.checkpoint.layout import STEP
from mpcli.diagnose import remedies
from mpcli.diagnose.born import began
from mpcli.diagnose.checks.memory import out_of_memory
from mpcli.diagnose.course import FEWEST, course_of
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.facts import TensorFacts
from mpcli.diagnose.finding import Finding, Suggestion
from mpcli.diagnose.modules import FP16_OVERFLOW
from mpcli.diagnose.verdict import layer_of, listed
from mpcli.precision.trace import WEIGHTS

STATISTICS = ("running_mean", "running_var")
EPS = 1e-5
"""Of torch's BatchNorm: a variance below it is not what the layer divides by."""
UNLIKE = 4.0
"""Times the loss with the batch's own statistics. In sound runs of a conv net of 20 steps and more
the running statistics gave at most half of the first loss, or at most twice the batch's."""
GONE = 0.5
"""Of the L2 norm of a layer's weights, that fp16 makes zero: the layer is another one then. Biases
that have hardly left 0 are nothing beside its weights."""


def batchnorm_stats(evidence: Evidence) -> Iterator[Finding]:
    """Running statistics that are not finite, vanish, or do not stand for the batches'."""
    tensors = _statistics(evidence)
    broken = [tensor for tensor in tensors if tensor.nan or tensor.inf]
    if broken:
        names = _layers(broken)
        yield _of_statistics(
            evidence,
            f"the running statistics of {_named(names)} hold NaN or infinity: every evaluation is "
            "NaN, whatever the weights are",
            names,
            _saved_step(evidence),
            {"nonfinite_values": sum(tensor.nan + tensor.inf for tensor in broken)},
            0.95,
        )
        return
    step, names = _seen_by_recorder(evidence)
    if names:
        yield _of_statistics(
            evidence,
            f"a step left NaN or infinity in the running statistics of {_named(names)}: the scaler "
            "skips the update of weights, not that of statistics",
            names,
            step,
            {"first_step": step},
            0.95,
        )
        return
    tiny = [
        tensor for tensor in tensors if tensor.name.endswith("running_var") and tensor.max < EPS
    ]
    if tiny:
        largest = max(tensor.max for tensor in tiny)
        yield _of_statistics(
            evidence,
            f"the running variance of {_named(_layers(tiny))} is at most {largest:.2g}, below "
            f"BatchNorm's eps of {EPS:g}: the layer no longer normalises",
            _layers(tiny),
            _saved_step(evidence),
            {"largest_variance": largest},
            0.8,
        )
        return
    yield from _unlike_batches(evidence, tensors)


def _unlike_batches(evidence: Evidence, tensors: list[TensorFacts]) -> Iterator[Finding]:
    """A loss that is small with the batch's statistics, and not with the running ones.

    A replay computes both for one batch. Without it an evaluation says the same where it is far
    above the loss of the untrained model; it may also be data that were learnt by heart.
    """
    course, replay = course_of(evidence.history), evidence.replay
    if course is None or course.steps < FEWEST or course.end == math.inf or not tensors:
        return
    if replay and replay.running_statistics_loss is not None:
        seen, own = replay.running_statistics_loss, replay.shadow_losses.get("fp32", math.nan)
        if seen < course.start or not own * UNLIKE < seen:
            return  # statistics of weights that still learn fast lag behind them
        what, confidence, step = f"for the batch of step {replay.step}", 0.9, replay.step
    elif evidence.evaluations:
        last = evidence.evaluations[-1]
        seen, own, step = last.loss, course.end, last.step
        if not seen > 3 * course.start or not own * UNLIKE < seen:
            return
        what, confidence = "on the evaluation data", 0.5
    else:
        return
    names = _layers([tensor for tensor in tensors if tensor.name.endswith("running_var")])
    yield _of_statistics(
        evidence,
        f"with BatchNorm's running statistics the loss is {seen:.3g} {what}, with those of the "
        f"batch {own:.3g}: the statistics do not stand for the data",
        names,
        step,
        {"loss_with_running_statistics": seen, "loss_with_batch_statistics": own},
        confidence,
    )


def _of_statistics(
    evidence: Evidence,
    cause: str,
    layers: tuple[str, ...],
    step: int | None,
    numbers: dict[str, float | str | bool | None],
    confidence: float,
) -> Finding:
    again = Suggestion(
        what="compute the statistics again from the training data, in fp32",
        code="torch.optim.swa_utils.update_bn(loader, model.float())",
    )
    changes = [again]
    if evidence.recipe and evidence.recipe.precision.mode.endswith("-pure"):
        changes.insert(0, remedies.fp32_layers(evidence, ("norm",)))
    if evidence.plan and evidence.plan.accumulation > 1:
        changes.insert(0, remedies.whole_batches())
    return Finding(
        id="batchnorm-stats",
        severity="warning",
        cause=cause,
        layers=layers,
        phase="forward",
        step=step,
        confidence=confidence,
        evidence=numbers,
        suggestion=changes[0],
        alternatives=tuple(changes[1:]),
    )


def _seen_by_recorder(evidence: Evidence) -> tuple[int | None, tuple[str, ...]]:
    """The first step after which statistics were not finite, and whose."""
    for row in evidence.events:
        names = [event.name for event in row.events if event.event == "buffer_nonfinite"]
        found = [layer_of(name) for name in names if name and name.endswith(STATISTICS)]
        if found:
            return row.step, tuple(dict.fromkeys(found))
    return None, ()


def weights_exceed_fp16(evidence: Evidence) -> Iterator[Finding]:
    """Weights that fp16 cannot hold, as of models that were trained in bf16."""
    tensors = [tensor for tensor in _weights(evidence) if _computes_in_fp16(evidence, tensor.name)]
    above = [tensor for tensor in tensors if tensor.max >= FP16_OVERFLOW]
    if not above:
        yield from _sampled_above(evidence)
    gone = [
        layer
        for layer in (evidence.facts.weights.layers if evidence.facts.weights else ())
        if (layer.formats["fp16"].error or 0) > GONE and (layer.formats["fp16"].below or 0) > GONE
    ]
    found = sorted(above, key=lambda tensor: -tensor.max) or gone
    if not found:
        return
    names = _layers(found) if above else tuple(layer.name for layer in gone)
    matters = evidence.compute == "fp16"
    if above:
        cause = (
            f"`{found[0].name}` has weights up to {found[0].max:.4g}, and fp16 ends at 65504: cast "
            "to fp16 they are infinite"
        )
    else:
        share = found[0].formats["fp16"].below or 0
        cause = f"{share:.0%} of `{found[0].name}` is below 2^-25: cast to fp16 it is zero"
    yield Finding(
        id="weights-exceed-fp16",
        severity=("error" if above else "warning") if matters else "info",
        cause=cause,
        layers=names,
        phase="forward",
        step=_grew_at(evidence, found) if above else None,
        confidence=0.95,
        evidence={
            "largest_weight": max(tensor.max for tensor in found),
            "share_flushed": max(tensor.formats["fp16"].below or 0 for tensor in found),
            "tensors": len(found),
        },
        suggestion=remedies.bf16(evidence),
        alternatives=(remedies.fp32_layers(evidence, names),),
    )


def _sampled_above(evidence: Evidence) -> Iterator[Finding]:
    """The same of weights that no checkpoint has, but a sampled step."""
    for sample in evidence.samples:
        rows = [
            row
            for row in sample.of("weight")
            if FP16_OVERFLOW <= row.max < math.inf and _computes_in_fp16(evidence, row.name)
        ]
        if rows and evidence.compute == "fp16":
            rows.sort(key=lambda row: -row.max)
            names = tuple(dict.fromkeys(row.module for row in rows))
            yield Finding(
                id="weights-exceed-fp16",
                severity="error",
                cause=f"`{rows[0].name}` has weights up to {rows[0].max:.4g} in step "
                f"{sample.step}, and fp16 ends at 65504: cast to fp16 they are infinite",
                layers=names,
                phase="forward",
                step=None if sample is evidence.samples[0] else sample.step,
                confidence=0.95,
                evidence={"largest_weight": rows[0].max, "tensors": len(rows)},
                suggestion=remedies.bf16(evidence),
                alternatives=(remedies.fp32_layers(evidence, names),),
            )
            return


def _computes_in_fp16(evidence: Evidence, name: str) -> bool:
    """Whether a weight becomes fp16: where nothing was observed, unless a plan says otherwise."""
    seen = evidence.facts.run.types.get(layer_of(name)) if evidence.facts.run else None
    if seen and evidence.compute == "fp16":
        return "fp16" in f"{seen.stored}+{seen.operands}".split("+")
    rows = evidence.plan.modules if evidence.plan else ()
    computed = {row.name: row.computed for row in rows}.get(layer_of(name), "fp16")
    return evidence.compute != "fp16" or computed != "fp32"


def _grew_at(evidence: Evidence, found: list[TensorFacts]) -> int | None:
    """The first sampled step with such weights; None where they began so, or nobody saw it."""
    names = {tensor.name for tensor in found}
    for number, sample in enumerate(evidence.samples):
        if any(r.name in names and r.max >= FP16_OVERFLOW for r in sample.of("weight")):
            return sample.step if number else None
    return _saved_step(evidence) if evidence.samples else None


def bad_checkpoint(evidence: Evidence) -> Iterator[Finding]:
    """Checkpoints that cannot be read, and weights in them that are not finite."""
    facts = evidence.facts
    if facts.kind == "run":
        damaged = [
            left for left in facts.not_read if left.file.startswith(("checkpoints", "final"))
        ]
        if damaged:
            good = Path(facts.weights_from).name if facts.weights_from else None
            yield _bad(
                f"{', '.join(f'`{left.file}`' for left in damaged[:3])} cannot be used: "
                f"{damaged[0].why.splitlines()[0].rpartition('cannot be used: ')[2].rstrip('.')}",
                (),
                None,
                {"damaged": len(damaged), "newest_good": good},
            )
    if first := _bad_from_the_start(evidence):
        yield _bad(
            f"the weights that the run began with hold NaN or infinity, first in `{first[0]}`",
            first,
            int(evidence.history.step[0]) if len(evidence.history) else None,
            {"newest_good": None},
        )
        return
    broken = [tensor for tensor in _weights(evidence) if tensor.nan or tensor.inf]
    if broken:
        names = _layers(broken)
        place = Path(facts.weights_from or facts.path).name
        yield _bad(
            f"`{place}` has NaN or infinity in {len(broken)} of its {len(_weights(evidence))} "
            f"weights, first in `{names[0]}`",
            names,
            _saved_step(evidence),
            {
                "nonfinite_values": sum(tensor.nan + tensor.inf for tensor in broken),
                "newest_good": facts.finite_checkpoint,
            },
        )


def _bad_from_the_start(evidence: Evidence) -> tuple[str, ...]:
    """Modules whose weights were not finite before the first step, as a replay or a sample saw."""
    replay = evidence.replay
    origin = replay.origin if replay else None
    if (
        replay
        and origin
        and origin.operation == WEIGHTS
        and began(evidence.history, replay.step) == 1
    ):
        return (origin.module,)
    sample = evidence.samples[0] if evidence.samples else None
    if sample is None or sample.step != 1:
        return ()
    rows = [row for row in sample.of("weight") if row.nan or row.inf]
    return tuple(dict.fromkeys(row.module for row in rows))


def _bad(
    cause: str,
    layers: tuple[str, ...],
    step: int | None,
    numbers: dict[str, float | str | bool | None],
) -> Finding:
    good = numbers["newest_good"]
    what = f"go on from `{good}`, the newest good one" if good else "begin with other weights"
    return Finding(
        id="bad-checkpoint",
        severity="error",
        cause=cause,
        layers=layers,
        phase="input",
        step=step,
        confidence=1.0,
        evidence=numbers,
        suggestion=Suggestion(what=what),
    )


def optimizer_state_corrupted(evidence: Evidence) -> Iterator[Finding]:
    """Optimizer state that is not finite: each later update is NaN."""
    states = evidence.facts.optimizer.states if evidence.facts.optimizer else ()
    broken = [state for state in states if state.nonfinite]
    if not broken:
        return
    names = dict.fromkeys(name for state in broken for name in state.nonfinite)
    layers = tuple(dict.fromkeys(map(layer_of, names)))
    yield Finding(
        id="optimizer-state-corrupted",
        severity="error",
        cause=f"`{broken[0].key}` of the optimizer holds NaN or infinity for {len(names)} weights, "
        f"first `{next(iter(names))}`: every update of those is NaN from now on",
        layers=layers,
        phase="update",
        step=_saved_step(evidence),
        confidence=1.0,
        evidence={state.key: state.nan + state.inf for state in broken},
        suggestion=Suggestion(what="go on from the weights alone, with a fresh optimizer"),
    )


def _weights(evidence: Evidence) -> list[TensorFacts]:
    """Without BatchNorm's statistics, which no product multiplies."""
    tensors = evidence.facts.weights.tensors if evidence.facts.weights else ()
    return [tensor for tensor in tensors if not tensor.name.endswith(STATISTICS)]


def _statistics(evidence: Evidence) -> list[TensorFacts]:
    tensors = evidence.facts.weights.tensors if evidence.facts.weights else ()
    return [tensor for tensor in tensors if tensor.name.endswith(STATISTICS)]


def _layers(tensors: list[TensorFacts]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer_of(tensor.name) for tensor in tensors))


def _named(names: tuple[str, ...]) -> str:
    return f"`{names[0]}`" if len(names) == 1 else listed(names)


def _saved_step(evidence: Evidence) -> int | None:
    """After which the weights that were read were saved."""
    name = Path(evidence.facts.weights_from or "").name
    if match := STEP.fullmatch(name):
        return int(match[1])
    history = evidence.history
    return int(history.step[-1]) if len(history) else None


STATE: tuple[Callable[[Evidence], Iterable[Finding]], ...] = (
    batchnorm_stats, weights_exceed_fp16, bad_checkpoint, optimizer_state_corrupted, out_of_memory,
)  # fmt: skip
