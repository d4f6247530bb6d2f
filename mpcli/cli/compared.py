"""What `mptrain compare` prints: the sides first, the verdict last."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from mpcli.cli.console import clock_text, memory_text, show_table, write
from mpcli.cli.listing import run_metric_text, show_listing, steps_text, time_text
from mpcli.comparison.compare import Comparison, Facts, Measure
from mpcli.comparison.curves import TENTHS, Apart
from mpcli.comparison.differences import Differing
from mpcli.comparison.sides import ComparedRun, KeptFinding, Side, Spread
from mpcli.comparison.verdict import Verdict
from mpcli.recipe.dump import written
from mpcli.recipe.render import visible
from mpcli.sizes import metric_text
from mpcli.states import METRICS

ROWS = 20  # of a table
_LONGEST = 60  # characters of a value


def show(compared: Comparison) -> None:
    """Print a comparison on stdout."""
    _show_runs(compared.sides)
    _show_differences("recipe", compared, compared.recipe)
    _show_differences("environment", compared, compared.environment)
    _show_differences("plan", compared, _by_module(compared.plan))
    _show_measures(compared)
    _show_curves(compared)
    _show_findings(compared.sides)
    for sentence in _sentences(compared):
        write(_wrapped(visible(sentence)))


def as_object(compared: Comparison) -> dict[str, Any]:
    """A comparison as `--json` prints it."""
    labels = [side.label for side in compared.sides]

    def by_side(values: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(labels, values, strict=True))

    def rows(differing: Iterable[Differing]) -> list[dict[str, Any]]:
        return [{"path": row.path, "values": by_side(row.values)} for row in differing]

    return {
        "sides": [_side_object(side, compared.metric) for side in compared.sides],
        "same_recipe": None if compared.recipe_unknown else compared.alike,
        "unknown": compared.unknown,
        "recipe": rows(compared.recipe),
        "environment": rows(compared.environment),
        "plan": rows(compared.plan),
        "results": [
            {
                "name": measure.name,
                "split": measure.split,
                "sides": by_side(one and asdict(one) for one in measure.sides),
            }
            for measure in compared.measures
        ],
        "loss": {
            "tenths": by_side(compared.tenths),
            "apart": dict(zip(labels[1:], map(asdict, compared.apart), strict=True)),
        },
        "metric": compared.metric and dict(zip(("split", "name"), compared.metric, strict=True)),
        "verdicts": [asdict(verdict) for verdict in compared.verdicts],
        "together": compared.together and asdict(compared.together),
        "sentences": _sentences(compared),
    }


def _side_object(side: Side, metric: tuple[str, str] | None) -> dict[str, Any]:
    return {
        "label": side.label,
        "seeds": side.seeds,
        "left_out": side.left_out(*metric) if metric else (),
        "runs": [
            {
                "path": str(run.path),
                "state": run.about.state,
                "seed": run.seed,
                "metrics": run.metrics,
                "findings": None if run.findings is None else [asdict(f) for f in run.findings],
            }
            for run in side.runs
        ],
    }


def _show_runs(sides: Sequence[Side]) -> None:
    rows = [
        (
            f"{side.label}  {run.path}",
            run.about.state,
            "" if run.seed is None else str(run.seed),
            steps_text(run.about),
            run_metric_text(run.about),
            time_text(run.about),
        )
        for side in sides
        for run in side.runs
    ]
    show_listing("Runs", ("run", "state", "seed", "steps", "metric", "time"), rows)


def _show_differences(of: Facts, compared: Comparison, rows: Sequence[Differing]) -> None:
    title, unknown = of.capitalize(), compared.unknown[of]
    labels = [side.label for side in compared.sides]
    if not rows:
        not_known = [f"not known of {', '.join(unknown)}"] if unknown else []
        none = ["no difference"] if len(labels) - len(unknown) > 1 or not unknown else []
        write(f"{title}: {'; '.join(none + not_known)}\n")
        return
    shown = [(row.path, *map(_values_text, row.values)) for row in rows[:ROWS]]
    _show(title, ("", *labels), shown, len(rows))


def _by_module(rows: Iterable[Differing]) -> list[Differing]:
    """Modules that differ alike in one row, with the name of the first."""
    alike: dict[tuple[str, str], list[Differing]] = {}
    for row in rows:
        prefix, _, field = row.path.rpartition(".")
        of_module = prefix.startswith("modules.")
        key = (field, repr(row.values)) if of_module else (row.path, "")
        alike.setdefault(key, []).append(row)
    return [
        replace(first, path=f"{first.path} and of {len(others):,} more") if others else first
        for first, *others in alike.values()
    ]


def _show(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], number: int | None = None
) -> None:
    show_table(title, header, rows)
    if number and number > len(rows):
        write(f"and {number - len(rows):,} more: `--json` has them all\n")


def _values_text(values: tuple[Any, ...] | None) -> str:
    if values is None:
        return "unknown"
    return (
        " or ".join("-" if value == "-" else _shortened(written(value)) for value in values) or "-"
    )


def _wrapped(sentence: str) -> str:
    """In the width of a terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    return textwrap.fill(sentence, max(width, 20), subsequent_indent="  ", break_long_words=False)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _show_measures(compared: Comparison) -> None:
    grouped = any(len(side.runs) > 1 for side in compared.sides)
    title = "Results: mean ± standard error" if grouped else "Results"
    labels = [side.label for side in compared.sides]
    measures = sorted(compared.measures, key=_order)[:ROWS]
    rows = [(_measure_name(m), *(_spread_text(m, one) for one in m.sides)) for m in measures]
    _show(title, ("", *labels), rows, len(compared.measures))


def _order(measure: Measure) -> int:
    """What is judged by comes first."""
    return METRICS.index(measure.name) if measure.name in METRICS else len(METRICS)


def _measure_name(measure: Measure) -> str:
    return _shortened(f"{measure.split} {measure.name}" if measure.split else measure.name)


def _count_text(value: float) -> str:
    """A mean of counts has two decimals, a count none."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"


_FORMATS: dict[str, Callable[[float], str]] = {
    "steps": _count_text,
    "skipped": _count_text,
    "scale at the end": lambda value: f"{value:g}",
    "least scale": lambda value: f"{value:g}",
    "time": lambda value: clock_text(value) if value >= 60 else f"{value:.1f} s",
    "samples/s": lambda value: f"{value:,.0f}",
    "peak memory": lambda value: memory_text(round(value)),
}


def _number_text(measure: Measure, value: float) -> str:
    if measure.split:
        return metric_text(measure.name, value)
    return _FORMATS[measure.name](value)


def _spread_text(measure: Measure, spread: Spread | None) -> str:
    if spread is None:
        return "-"
    text = _number_text(measure, spread.mean)
    if spread.standard_error:
        text += f" ± {_number_text(measure, spread.standard_error)}"
    return text


def _show_curves(compared: Comparison) -> None:
    rows = [
        (
            f"to {100 * (tenth + 1) // TENTHS}%",
            *(_loss_text(side[tenth]) for side in compared.tenths),
        )
        for tenth in range(TENTHS)
        if any(side[tenth] is not None for side in compared.tenths)
    ]
    if not rows:
        write("Loss: no steps\n")
        return
    show_table("Mean loss in each tenth", ("", *(side.label for side in compared.sides)), rows)
    first = compared.sides[0].label
    for side, found in zip(compared.sides[1:], compared.apart, strict=True):
        write(_apart_text(side.label, first, found))
    write("")


def _loss_text(value: float | None) -> str:
    return "-" if value is None else metric_text("loss", value)


def _apart_text(side: str, reference: str, found: Apart) -> str:
    pair = f"{side} and {reference}"
    if not found.common:
        return f"{pair} have no step in common"
    if found.first is None:
        return f"{pair}: the same loss in all of {found.common:,} steps"
    text = f"{pair} differ from step {found.first:,} on"
    if found.step is None:
        return f"{text}, and none of their losses can be subtracted"
    ours, theirs = _loss_text(found.loss), _loss_text(found.reference)
    return f"{text}, most in step {found.step:,}: {ours} and {theirs}"


def _show_findings(sides: Sequence[Side]) -> None:
    """Where a diagnosis is kept, what it found."""
    diagnosed = [[run for run in side.runs if run.findings is not None] for side in sides]
    if not any(diagnosed):
        return
    ids = dict.fromkeys(f.id for runs in diagnosed for run in runs for f in run.findings or ())
    labels = [side.label for side in sides]
    if not ids:
        known = dict(zip(labels, diagnosed, strict=True))
        unknown = ", ".join(label for label in labels if not known[label])
        of_whom = ", ".join(label for label in labels if known[label])
        others = f"; not diagnosed: {unknown}" if unknown else ""
        write(f"Findings: none in {of_whom}{others}\n")
        return
    rows = [(_shortened(name), *(_finding_text(name, runs) for runs in diagnosed)) for name in ids]
    _show("Findings", ("", *labels), rows[:ROWS], len(rows))


def _finding_text(name: str, diagnosed: Sequence[ComparedRun]) -> str:
    if not diagnosed:
        return "not diagnosed"
    found: list[KeptFinding] = [
        next(f for f in run.findings or () if f.id == name)
        for run in diagnosed
        if any(f.id == name for f in run.findings or ())
    ]
    if not found:
        return "-"
    worst = found[0]
    where = f" in {worst.layers[0]}" if worst.layers else ""
    share = f", {len(found)} of {len(diagnosed)} runs" if len(diagnosed) > 1 else ""
    return _shortened(f"{worst.severity}{where}{share}")


def _sentences(compared: Comparison) -> list[str]:
    """What it comes down to."""
    return [*_counted(compared.sides), *_alike(compared), *_judged(compared)]


def _counted(sides: Sequence[Side]) -> Iterable[str]:
    """Which runs of groups do not count for themselves."""
    for side in sides:
        if len(side.runs) == 1:
            continue
        missing = [run.about.state for run in side.runs if not run.is_finished]
        if missing:
            states = ", ".join(dict.fromkeys(missing))
            yield f"{side.label}: {len(missing)} of {len(side.runs)} runs do not count: {states}"
        if len(side.seeds) < len(side.runs):
            yield f"{side.label}: runs with the same seed count as one"


def _alike(compared: Comparison) -> Iterable[str]:
    if not compared.alike:
        return
    runs = [run for side in compared.sides for run in side.runs]
    seeds = {run.seed for run in runs}
    if len(seeds) < len(runs):
        yield "all runs have the same recipe" + (
            " and seed: what differs is not of the recipe"
            if len(seeds) == 1
            else "; some have the same seed too, and count once"
        )
    else:
        yield "the recipes differ in nothing but `train.seed`"
    if compared.metric and (one := compared.together) and one.standard_error is not None:
        split, name = compared.metric
        spread = f"{metric_text(name, one.mean)} ± {metric_text(name, one.standard_error)}"
        yield f"{split} {name} over {one.seeds} seeds: {spread} (mean ± standard error)"


def _judged(compared: Comparison) -> Iterable[str]:
    if compared.metric is None:
        yield "no run has a metric to be judged by"
        return
    split, name = compared.metric
    for side in compared.sides:
        if seeds := side.left_out(split, name):
            have, are = ("has", "is") if len(seeds) == 1 else ("have", "are")
            left_out = f"{have} no finite {split} {name} and {are} left out"
            yield f"{side.label}: {_seeds_text(seeds)} {left_out}"
    tested = sum(verdict.p_holm is not None for verdict in compared.verdicts)
    for verdict in compared.verdicts:
        for label, seeds in verdict.unpaired.items():
            other = verdict.side if label == verdict.reference else verdict.reference
            have = "has" if len(seeds) == 1 else "have"
            of_what = "test" if verdict.difference.test else "difference"
            no_partner = f"{have} no partner in {other}: left out of the {of_what}"
            yield f"{_seeds_text(seeds)} of {label} {no_partner}"
        pair = f"{verdict.side} - {verdict.reference}"
        yield f"{split} {name}, {pair}: {_verdict(verdict, name, tested)}"


def _seeds_text(seeds: Sequence[int]) -> str:
    *others, last = map(str, seeds)
    return f"seeds {', '.join(others)} and {last}" if others else f"seed {last}"


def _verdict(verdict: Verdict, name: str, tested: int) -> str:
    found = verdict.difference
    if found.mean is None:
        return f"cannot tell: {verdict.why_not}"
    text = _difference_text(name, found.mean, found.standard_error)
    if verdict.is_significant is None:
        return f"{text}; cannot tell from {verdict.why_not} whether that is more than seed noise"
    how = f"paired over {found.pairs} seeds" if found.test == "paired" else "over all seeds"
    p = f"p = {verdict.p_holm:.2g}"
    if tested > 1:
        p += f" (Holm, {tested} comparisons)"
    more = "more" if verdict.is_significant else "not more"
    return f"{text}, {how}, {p}: {more} than seed noise"


def _difference_text(name: str, value: float, error: float | None) -> str:
    factor, decimals, unit = (100, 2, " points") if name in METRICS else (1, 4, "")
    within = f" ± {factor * error:.{decimals}f}" if error else ""
    return f"{factor * value:+.{decimals}f}{within}{unit}"
