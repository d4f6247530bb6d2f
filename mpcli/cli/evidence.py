"""The evidence of `mptrain diagnose` as tables: what tells most; `--json` has all of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from mpcli.cli.console import show_table, write
from mpcli.diagnose.facts import (
    Facts,
    OptimizerFacts,
    RunFacts,
    ScalerFacts,
    TensorFacts,
    TrainerFacts,
    WeightFacts,
)
from mpcli.records import (
    FlightRecord,
    LayerRecord,
    LoopEvent,
    LoopRecord,
    ModuleTypes,
    NonFiniteOrigin,
    StepRecord,
)

ROWS = 20  # of a table

_Row = tuple[str, ...]


def show_evidence(evidence: Facts) -> None:
    """Print everything that was found, on stdout."""
    if evidence.run:
        _show_run(evidence.run)
    if evidence.trainer:
        _show_trainer(evidence.trainer)
    if evidence.weights:
        _show_weights(evidence.weights, evidence.weights_from or evidence.path)
    if evidence.optimizer:
        _show_optimizer(evidence.optimizer)
    if evidence.scaler:
        _show_scaler(evidence.scaler)
    if evidence.not_read:
        rows = [(left.file, left.why) for left in evidence.not_read]
        show("Not read", ("file", "why"), rows)


def _show_run(run: RunFacts) -> None:
    rows = [("steps", f"{run.steps}, of which {run.skipped} skipped")]
    if run.result:
        rows.append(("ended", " ".join(filter(None, (run.result.status, run.result.reason)))))
    if row := run.first_nonfinite:
        rows.append(("loss", f"not finite in {run.nonfinite_losses} steps, first in {row.step}"))
    if foreign := run.foreign:
        rows += [
            ("recorded", f"a {foreign.loop} loop, every {foreign.every} steps sampled"),
            ("model", f"{foreign.model}, {foreign.parameters:,} parameters"),
            ("optimizer", f"{foreign.optimizer}, scaler: {foreign.scaler or 'none'}"),
        ]
    rows += [("cannot be read", f"{n:,} rows of {file}") for file, n in run.unread.items()]
    show_table("Run", ("", ""), rows)
    show("Last steps", _STEP, map(_step, run.last))
    if run.sampled:
        _show_sampled(run.sampled)
    header = (*_STEP, "first NaN or infinity")
    unknown = "not known" if run.foreign else "see --replay"
    flights = [
        (*_step(row), origin_text(row.origin) if row.origin else unknown) for row in run.flights
    ]
    show("Steps that went wrong", header, flights)
    show("What the loop does", ("from step", "events"), map(_events, run.events))
    columns = ("modules", "such as", "stored", "operands", "computed", "gradient")
    show("Types in the first step", columns, _types(run.types))


_STEP = ("step", "loss", "grad norm", "scale", "applied")


def _step(row: StepRecord | FlightRecord) -> _Row:
    numbers = map(number_text, (row.loss, row.grad_norm))
    return str(row.step), *numbers, f"{row.scale:g}", "yes" if row.applied else "no"


def _trouble(row: LayerRecord) -> tuple[float, ...]:
    """Sorts what is worst first, by what the table shows."""
    lost = (_flushed(row) or 0.0, row.would_flush or 0.0)
    return -(row.nan + row.inf), -row.at_least_65520, -max(lost), -row.subnormal, -row.max


def _flushed(row: LayerRecord) -> float | None:
    return row.shadow.flushed if row.shadow else None


def _show_sampled(rows: Sequence[LayerRecord]) -> None:
    """The last sampled step; what was flushed is known only beside a shadow."""
    ranked = sorted(rows, key=_trouble)
    header: _Row = ("tensor", "of", "type", "max", "zeros", "subnormal", "not finite")
    cells = [_sampled(row) for row in ranked]
    columns: dict[str, list[float | None]] = {
        ">= 65520": [row.at_least_65520 for row in ranked],
        "fp16 flushes": [row.would_flush for row in ranked],
        "flushed": [_flushed(row) for row in ranked],
    }
    for title, shares in columns.items():
        if any(shares):  # most have none
            header = (*header, title)
            cells = [(*row, share_text(x)) for row, x in zip(cells, shares, strict=True)]
    scale = rows[0].scale
    scaled = "" if scale == 1 else f" (gradients times the scale {scale:g})"
    show(f"Tensors of step {rows[0].step}{scaled}", header, cells)
    updates = sorted((row for row in rows if row.tensor == "update"), key=_least_moved)
    names = ("parameter", "update / weight", "unchanged though it has a gradient")
    show(f"Updates of step {rows[0].step}", names, map(_update, updates))


def _sampled(row: LayerRecord) -> _Row:
    return (
        row.name, row.tensor, row.dtype, number_text(row.max), share_text(row.zeros),
        share_text(row.subnormal), f"{row.nan + row.inf:,}",
    )  # fmt: skip


def _least_moved(row: LayerRecord) -> tuple[float, float]:
    return -(row.lost or 0.0), row.update_ratio or 0.0


def _update(row: LayerRecord) -> _Row:
    ratio = "-" if row.update_ratio is None else f"{row.update_ratio:.1e}"
    return row.name, ratio, share_text(row.lost)


def _events(row: LoopRecord) -> _Row:
    """A step of the loop, in the order in which it happened."""
    return str(row.step), ", ".join(map(_event, row.events))


def _event(event: LoopEvent) -> str:
    facts = {
        "": event.name,
        "by ": event.by,
        "autocast ": event.autocast,
        "gradients: ": event.gradients,
        "scale ": event.scale and f"{event.scale:g}",
        "limit ": event.limit and f"{event.limit:g}",
    }
    about = ", ".join(f"{label}{value}" for label, value in facts.items() if value)
    return f"{event.event} ({about})" if about else event.event


def _types(types: dict[str, ModuleTypes]) -> Iterator[_Row]:
    """A row for each combination of types, the most common one first."""
    combinations = {
        name: (seen.stored, seen.operands, seen.computed, seen.gradient)
        for name, seen in types.items()
    }
    for combination, number in Counter(combinations.values()).most_common():
        first = next(name for name, found in combinations.items() if found == combination)
        yield str(number), first or "(the model)", *combination


def _show_trainer(trainer: TrainerFacts) -> None:
    of = f" of {trainer.max_steps}" if trainer.max_steps else ""
    epoch = "" if trainer.epoch is None else f", epoch {trainer.epoch:g}"
    rows = [("steps", f"{trainer.global_step}{of}{epoch}")]
    if row := trainer.first_nonfinite:
        rows.append(("not finite", f"first logged at step {row.step}"))
    show_table("Trainer", ("", ""), rows)
    show(
        "Last log entries",
        ("step", "loss", "grad norm", "learning rate"),
        [
            (str(row.step), *map(number_text, (row.loss, row.grad_norm, row.learning_rate)))
            for row in trainer.last
        ],
    )


def _show_weights(weights: WeightFacts, where: str) -> None:
    total = weights.total
    types = ", ".join(f"{number:,} in {dtype}" for dtype, number in total.dtypes.items())
    rows = [
        ("read from", where),
        ("values", types),
        ("NaN, infinite", f"{total.nan:,}, {total.inf:,}"),
        ("zero", f"{total.zeros:,}"),
        ("largest", f"{number_text(total.max)}, {_bits(total.headroom_bits)} to fp16's overflow"),
    ]
    if not total.elements:
        rows = [("read from", where), ("values", "none that are floating-point numbers")]
    if weights.tied:
        rows.append(("tied", f"{len(weights.tied)} tensors, counted once"))
    if weights.not_examined:
        types = ", ".join(sorted(set(weights.not_examined.values())))
        rows.append(("not examined", f"{len(weights.not_examined)}, of type {types}"))
    show_table("Weights", ("", ""), rows)
    if not total.elements:
        return
    header = ("format", "overflow", "round to 0", "subnormal", "rounding error")
    formats = [
        (name, share_text(found.above), share_text(found.below), share_text(found.subnormal),
         "-" if found.error is None else f"{found.error:.1e}")
        for name, found in total.formats.items()
    ]  # fmt: skip
    show("Share of the values that a format cannot hold", header, formats)
    columns = ("layer", "max", "headroom", "over", "to zero", "subnormal", "not finite", "fits")
    show("Layers in fp16", columns, map(_layer, sorted(weights.layers, key=_tightness)))


def _tightness(layer: TensorFacts) -> tuple[float, ...]:
    """Sorts what fits worst first."""
    found, headroom = layer.formats["fp16"], layer.headroom_bits
    lost = (found.above or 0.0) + (found.below or 0.0)
    fits = layer.fits is None or layer.fits["fp16"]
    return fits, -(layer.nan + layer.inf), -lost, math.inf if headroom is None else headroom


def _layer(layer: TensorFacts) -> _Row:
    found = layer.formats["fp16"]
    return (
        layer.name, number_text(layer.max), _bits(layer.headroom_bits), share_text(found.above),
        share_text(found.below), share_text(found.subnormal), f"{layer.nan + layer.inf:,}",
        "-" if layer.fits is None else "yes" if layer.fits["fp16"] else "no",
    )  # fmt: skip


def _show_optimizer(optimizer: OptimizerFacts) -> None:
    show(
        "Optimizer's state",
        ("tensor", "how many", "values", "largest", "not finite", "all zero"),
        [
            (state.key, str(state.tensors), f"{state.elements:,}", number_text(state.max),
             f"{state.nan + state.inf:,}", str(len(state.zero)))
            for state in optimizer.states
        ],
    )  # fmt: skip


def _show_scaler(scaler: ScalerFacts) -> None:
    of = f" of {scaler.growth_interval}" if scaler.growth_interval else ""
    rows = [("scale", f"{scaler.scale:g}"), ("good steps", f"{scaler.growth_tracker}{of}")]
    show_table("Loss scale", ("", ""), rows)


def show(title: str, header: Sequence[str], rows: Iterable[_Row]) -> None:
    """The first rows of a table, which has some, and how many more there are."""
    rows = list(rows)
    if not rows:
        return
    show_table(title, header, rows[:ROWS])
    if len(rows) > ROWS:
        write(f"and {len(rows) - ROWS} more: `--json` has all\n")


def origin_text(origin: NonFiniteOrigin) -> str:
    """Where the first NaN or infinity came from."""
    if origin.phase == "input":
        return f"{origin.value} in the batch"
    if origin.operation == "weights":
        return f"{origin.value} in the weights of {origin.module or 'the model'}, before the step"
    by = f", by {origin.operation}" if origin.operation else ""
    return f"{origin.value} made in {origin.module or 'the model'}, {origin.phase}{by}"


def number_text(value: float | None) -> str:
    """In four digits."""
    return "-" if value is None else f"{value:.4g}"


def share_text(value: float | None) -> str:
    """In percent; a share that is small is not called zero."""
    if not value:
        return "-" if value is None else "0"
    return f"{value:.2%}" if value >= 1e-4 else "<0.01%"


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} bits" if value >= 0 else "none"
