"""What a report says in words and tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from mpcli.comparison.differences import Flat, differing, flat, without_times
from mpcli.diagnose.finding import Finding, Suggestion, Verification
from mpcli.report.markup import Content, Html, details, element, table, together
from mpcli.report.sources import Diagnosis, Run, Sources, Sweep
from mpcli.sizes import metric_text, size_text

_ORDER = ("error", "warning", "info")


def summary(found: Sources) -> Html:
    """What happened: each run in a row, and what is missing of it."""
    charted = found.charted
    rows = [
        _summary_row(run, swatch(charted.index(run)) if run in charted else None)
        for run in found.runs
    ]
    parts: list[Content] = []
    if rows:
        header = ("run", "state", "result", "steps", "time", "peak memory", "precision")
        parts.append(table(header, rows))
    for run in found.runs:
        if run.result:
            parts += [_ended(run)]
    missing = [(run.label, text) for run in found.runs for text in run.missing]
    missing += [(sweep.label, text) for sweep in found.sweeps for text in sweep.missing]
    if missing:
        items = [element("li", element("b", label), f": {text}") for label, text in missing]
        parts.append(element("div", element("h3", "What is missing"), element("ul", items),
                             class_="missing"))  # fmt: skip
    return together(*parts)


def _summary_row(run: Run, color: Html | None) -> tuple[Content, ...]:
    name = together(color, run.label)
    state = element("span", run.state, class_=f"badge {_tone(run)}")
    skipped = int((run.steps["applied"] == 0).sum())
    attempts = len(run.attempts)
    steps = f"{len(run.steps):,}, {skipped:,} skipped"
    if attempts > 1:
        steps += f", in {attempts} attempts"
    memory = size_text(run.peak_memory_bytes) if run.peak_memory_bytes else "unknown"
    if run.planned_peak:
        memory += f" ({size_text(run.planned_peak)} planned)"
    return (
        name, state, _metrics(run), steps,
        "unknown" if run.wall_seconds is None else f"{run.wall_seconds:,.1f}\u00a0s",
        memory, _text(run.values.get("precision.mode", "unknown")),
    )  # fmt: skip


def _tone(run: Run) -> str:
    return {"done": "good", "diverged": "error", "failed": "error"}.get(run.state, "warning")


def _metrics(run: Run) -> str:
    split = "eval" if run.metrics.get("eval") else "train"
    shown = sorted(run.metrics.get(split, {}).items(), key=lambda item: item[0] == "loss")
    told = [f"{split} {name} {metric_text(name, value)}" for name, value in shown]
    return ", ".join(told) or "unknown"


def _ended(run: Run) -> Content:
    result = run.result
    if result is None:
        return None
    told = [problem["message"] + (f" ({problem['hint']})" if problem["hint"] else "")
            for problem in result.problems]  # fmt: skip
    messages = [problem["message"] for problem in result.problems]
    if result.reason and result.reason not in (*messages, "; ".join(messages)):
        told.insert(0, result.reason)
    return element("p", element("b", run.label), ": ", _marked("; ".join(told))) if told else None


def _marked(text: str) -> Content:
    """Text in which backticks stand around code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return text
    return [element("code", part) if n % 2 else part for n, part in enumerate(parts)]


def swatch(number: int, dash: int = 0) -> Html:
    """The colour of a run, or the dash of a curve."""
    return element("i", class_=f"swatch c{number % 8} dash{dash % 4}", aria_hidden="true")


def attempts(runs: Sequence[Run]) -> Html | None:
    """Resumes, restarts and returns to checkpoints."""
    rows = [
        (run.label, _first_step(run, attempt.number), f"attempt {attempt.number} began",
         _marked("; ".join(attempt.changes) or "nothing was changed"))
        for run in runs for attempt in run.attempts if attempt.number > 1
    ] + [
        (run.label, f"{row.step:,}", f"back to step {row.checkpoint:,}", _marked(row.reason))
        for run in runs for row in run.rollbacks
    ]  # fmt: skip
    if not rows:
        return None
    header = ("run", "step", "what", "why, or what changed")
    return table(header, rows, caption="Resumes, restarts and returns to a checkpoint")


def _first_step(run: Run, attempt: int) -> str:
    steps = run.steps["step"][run.steps["attempt"] == attempt]
    return f"{int(steps[0]):,}" if len(steps) else "none"


def findings(diagnoses: Sequence[Diagnosis]) -> Html:
    """Causes with evidence and fixes, the worst first."""
    if not diagnoses:
        return element(
            "p", "No diagnosis was given. ",
            element("code", "mptrain diagnose RUN --verify --json > diagnosis.json"),
            " looks for causes and tries their fixes; after ",
            element("code", "mv diagnosis.json RUN/"), " a report shows them here.",
        )  # fmt: skip
    return together(*[_diagnosis(diagnosis) for diagnosis in diagnoses])


def _diagnosis(diagnosis: Diagnosis) -> Html:
    ranked = sorted(diagnosis.findings, key=lambda finding: _ORDER.index(finding.severity))
    of = f" of {diagnosis.of}" if diagnosis.of and diagnosis.of != diagnosis.label else ""
    unread = f"{diagnosis.unread} findings cannot be read." if diagnosis.unread else None
    return element(
        "div",
        element("h3", diagnosis.label + of),
        element("p", _marked(diagnosis.verdict or "No verdict.")),
        element("p", unread, class_="missing") if unread else None,
        [_finding(finding) for finding in ranked],
        class_="diagnosis",
    )


def _finding(finding: Finding) -> Html:
    where = [*finding.layers[:3], finding.phase]
    if len(finding.layers) > 3:
        where.insert(3, f"{len(finding.layers) - 3} more layers")
    if finding.step is not None:
        where.append(f"step {finding.step:,}")
    numbers = [
        element("li", f"{name.replace('_', ' ')}: {_value(value)}")
        for name, value in finding.evidence.items() if value is not None
    ]  # fmt: skip
    follows = ", ".join(dict.fromkeys(found.id for found in finding.consequences))
    return element(
        "article",
        element(
            "h4", element("span", finding.severity, class_=f"badge {finding.severity}"), " ",
            element("code", finding.id), element("small", " " + ", ".join(where)),
        ),
        element("p", _marked(finding.cause)),
        element("ul", numbers, class_="numbers") if numbers else None,
        _suggestion(finding.suggestion, finding.verified),
        _alternatives(finding.alternatives),
        [_tried(tried) for tried in finding.tried],
        element("p", "Not tried: ", _marked(finding.not_tried)) if finding.not_tried else None,
        element("p", f"Leads to: {follows}") if follows else None,
        class_=f"finding {finding.severity}",
    )  # fmt: skip


def _suggestion(suggestion: Suggestion | None, verified: bool | None) -> Html | None:
    if suggestion is None:
        return None
    known = {True: "tried: it helps", False: "tried: it does not help", None: "not tried"}[verified]
    tone = "good" if verified else "warning"
    return together(
        element("p", element("b", "Fix: "), _marked(suggestion.what), " ",
                element("span", known, class_=f"badge {tone}")),
        _change(suggestion),
    )  # fmt: skip


def _alternatives(others: Sequence[Suggestion]) -> Html | None:
    if not others:
        return None
    listed = [element("li", _marked(other.what), _change(other)) for other in others]
    return together(element("p", element("b", "Or, where that does not help:")),
                    element("ul", listed))  # fmt: skip


def _change(suggestion: Suggestion) -> Html | None:
    lines = [f"--set {shlex.quote(setting)}" for setting in suggestion.set]
    lines += (suggestion.code or "").splitlines()
    if suggestion.arguments:
        given = ", ".join(f"{name}={value!r}" for name, value in suggestion.arguments.items())
        lines.append(f"TrainingArguments({given})")
    return element("pre", "\n".join(lines), tabindex=0) if lines else None


def _tried(tried: Verification) -> Html:
    helped = "helps" if tried.fixed else "does not help"
    parts = [f"{tried.suggestion.what}: {helped}. {tried.why}"]
    if tried.with_it:
        parts.append(
            f" {tried.symptom}: {_value(tried.without.symptom)} without it, "
            f"{_value(tried.with_it.symptom)} with it;"
            f" loss {_value(tried.without.loss)} and {_value(tried.with_it.loss)};"
            f" {_value(tried.without.seconds_per_step)} s and "
            f"{_value(tried.with_it.seconds_per_step)} s per step."
        )
    return element("p", element("b", "Tried: "), _marked("".join(parts)))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 2**53 else f"{value:.4g}"


def types(run: Run) -> Html | None:
    """Planned and observed types of every module."""
    planned = {module.name: module for module in run.plan.modules} if run.plan else {}
    foreign = {module.name: module for module in run.foreign.modules} if run.foreign else {}
    rows: list[tuple[Content, ...]] = []
    for name in dict.fromkeys((*planned, *foreign, *run.observed)):
        plan, own = planned.get(name), foreign.get(name)
        seen = run.observed.get(name) or own
        rows.append((
            name or "(the model itself)",
            plan.type if plan else own.type if own else "",
            *[
                _both(getattr(plan, part, None), getattr(seen, part, None))
                for part in ("stored", "computed", "gradient")
            ],
            plan.master if plan else "",
            plan.why if plan else "not planned" if run.plan else "",
        ))  # fmt: skip
    if not rows:
        return None
    header = ("module", "type", "stored", "computed", "gradient", "master", "why")
    differ = sum(isinstance(cell, Html) for row in rows for cell in row)
    told = "as planned" if not differ else f"{differ} differ from the plan"
    if run.plan is None:
        told = f"{'observed' if run.observed else 'not observed'}; nothing was planned"
    elif not run.observed:
        told = "planned; no step was observed"
    return details(f"{run.label}: {len(rows)} modules, {told}", table(header, rows))


def _both(planned: str | None, seen: str | None) -> Content:
    if planned is None or seen is None or planned == seen:
        return planned or seen or ""
    return element("span", f"{seen}, planned {planned}", class_="differs")


def recipes(runs: Sequence[Run]) -> Html:
    """What differs between the runs, then each recipe as it was written and as it was resolved."""
    parts: list[Content] = []
    if len(runs) > 1:
        rows = list(_differing([run.values for run in runs]))
        header = ("setting", *[run.label for run in runs])
        parts.append(
            table(header, rows, caption="What differs")
            if rows else element("p", "The recipes are the same.")
        )  # fmt: skip
    for run in runs:
        if run.source is not None:
            title = f"{run.label}: as it was written"
            parts.append(details(title, element("pre", run.source, tabindex=0)))
        if run.values:
            what = "what is known of its loop" if run.foreign else "every value"
            values = [(path, _text(value)) for path, value in run.values.items()]
            parts.append(details(f"{run.label}: {what}", table(("setting", "value"), values)))
    return together(*parts)


def environments(runs: Sequence[Run]) -> Html:
    """What differs between all attempts, then everything."""
    columns = {
        run.label if len(run.attempts) == 1 else f"{run.label}, attempt {attempt.number}":
        attempt.environment
        for run in runs for attempt in run.attempts if attempt.environment
    }  # fmt: skip
    if not columns:
        return element("p", "Nothing is known of it.")
    values = list(columns.values())
    names = list(dict.fromkeys(name for one in values for name in one))
    header = ("", *columns)
    everything = [(name, *[_text(one.get(name, "nothing")) for one in values]) for name in names]
    differ = list(_differing([without_times(one) for one in values]))
    return together(
        table(header, differ, caption="What differs") if differ else None,
        details(f"all {len(names)} facts", table(header, everything)),
    )


def _differing(columns: Sequence[Flat]) -> Iterator[tuple[str, ...]]:
    for row in differing([[column] for column in columns]):
        yield row.path, *[_text(values[0]) if values else "nothing" for values in row.values]


def sweep(found: Sweep) -> Html:
    """The table of a sweep, and what it recommends."""
    rows = [
        {path: _text(value) for path, value in flat(row).items() if not path.startswith("layers.")}
        for row in found.rows
    ]
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_short(row.get(name, "")) for name in header] for row in rows]
    advice = [(path, _text(value)) for path, value in flat(found.recommended).items()]
    return together(
        element("h3", f"{found.label}: {found.kind}"),
        table(("recommended", ""), advice) if advice else None,
        table(header, cells, caption="Rows") if rows else element("p", "It has no rows yet."),
    )


def _text(value: Any, deepest: int = 20) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        inner = (_text(item, deepest - 1) for item in value) if deepest else "…"
        return f"[{', '.join(inner)}]"
    return json.dumps(value, default=str)


def _short(text: str) -> str:
    try:
        return _value(float(text)) if "." in text or "e" in text else text
    except ValueError:
        return text
