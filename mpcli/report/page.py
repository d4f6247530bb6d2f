"""The page: what happened first, then the charts, then what it was made of."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import importlib.util
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpcli.recipe.errors import Exit, user_error
from mpcli.report import tables
from mpcli.report.layers import QUANTITIES, SMALLEST_SHARE, compressed
from mpcli.report.markup import Content, Html, element, json_script, together
from mpcli.report.sources import Run, Sources

MOST_LAYER_ROWS = 60_000
"""Of all runs together; beyond, neighbouring sampled steps are shown as one."""
_TENSORS = {
    "grad": "gradients of the parameters",
    "grad_output": "gradients of the outputs",
    "output": "outputs",
    "weight": "weights",
    "update": "updates",
}


def report_page(found: Sources) -> str:
    """The whole report.

    Raises:
        UserError: exit 3, the charts' library is not installed.
    """
    if importlib.util.find_spec("bokeh") is None:
        raise user_error(
            "the charts need bokeh, which is not installed",
            "pip install 'mptrain[report]'",
            exit_code=Exit.ENVIRONMENT,
        )
    from bokeh.document import Document

    from mpcli.report.charts import StepCharts, sweep_charts

    document = Document()
    runs = found.charted
    charts = StepCharts(runs)
    layers = [run.layers.packed(MOST_LAYER_ROWS // len(runs)) if run.layers else [] for run in runs]
    training = list(charts.training()) if runs else []
    speed = list(charts.speed()) if runs else []
    by_layer = [charts.exponents(), charts.layer_map()] if any(layers) else []
    sweeps = [list(sweep_charts(sweep, n)) for n, sweep in enumerate(found.sweeps)]
    with document.models.freeze():  # or they are searched through for each of them
        for chart in (*training, *speed, *by_layer, *(chart for own in sweeps for chart in own)):
            document.add_root(chart.figure)

    several = len(runs) > 1
    body = together(
        _section("Result", tables.summary(found)),
        _section("Findings", tables.findings(found.diagnoses)),
        _toolbar(runs) if training else None,
        _section(
            "Training",
            _thinned(charts),
            element("div", [_chart(chart, several) for chart in training], class_="charts"),
            tables.attempts(runs),
        )
        if training else None,
        _section(
            "Numbers by layer", _layer_controls(runs, layers),
            element("div", [_chart(chart, several) for chart in by_layer], class_="charts wide"),
        )
        if by_layer else None,
        _section(
            "Speed and memory",
            element("div", [_chart(chart, several) for chart in speed], class_="charts"),
        )
        if speed else None,
        _section("Sweeps", [
            together(
                tables.sweep(sweep),
                element("div", [_chart(chart, False) for chart in own], class_="charts"),
            )
            for sweep, own in zip(found.sweeps, sweeps, strict=True)
        ]) if found.sweeps else None,
        _section("Types", [tables.types(run) for run in found.runs]) if found.runs else None,
        _section("Recipe", tables.recipes(found.runs)) if found.runs else None,
        _section("Environment", tables.environments(found.runs)) if found.runs else None,
    )  # fmt: skip
    data = {
        "document": document.to_json(deferred=False),
        "layers": compressed(layers),
        "quantities": QUANTITIES,
        "smallest_share": SMALLEST_SHARE,
        "last_step": charts.last,
    }
    labels = [run.label for run in found.runs] + [sweep.label for sweep in found.sweeps]
    labels += [diagnosis.label for diagnosis in found.diagnoses]
    shown = list(dict.fromkeys(labels))
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    title = ", ".join(shown[:3]) + more
    return _document(f"mptrain: {title}", body, data)


def _document(title: str, body: Html, data: dict[str, Any]) -> str:
    bundle, script = Html(_bundle()), Html(_resource("report.js"))
    policy = (
        "default-src 'none'; "
        f"script-src {_hash(bundle)} {_hash(script)}; "
        # Bokeh makes <style> elements whose text follows from sizes and positions: no list of
        # hashes has them all. Attributes stay forbidden, and no style can load anything.
        "style-src-elem 'unsafe-inline'; style-src-attr 'none'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(_resource("report.css"))),
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    shown = element(
        "body",
        element("header", element("h1", title), element("p", f"made {made}")),
        element("noscript", element("p", "The charts need JavaScript; all else is here.")),
        element("main", body),
        json_script("data", data),
        element("script", bundle),
        element("script", script),
    )
    return f"<!doctype html>\n{element('html', head, shown, lang='en')}\n"


def _bundle() -> str:
    """Bokeh's script, without the parts that the charts do not use, from the installed package."""
    found = importlib.util.find_spec("bokeh")
    if found is None or found.origin is None:
        raise ImportError("bokeh")
    return (Path(found.origin).parent / "server/static/js/bokeh.min.js").read_text("utf-8")


def _resource(name: str) -> str:
    return (importlib.resources.files("mpcli.report") / name).read_text("utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _section(title: str, *content: Content) -> Html:
    return element("section", element("h2", title), *content)


def _toolbar(runs: Sequence[Run]) -> Html:
    """What acts on all charts over steps."""
    choices = [
        _checkbox(together(tables.swatch(number), run.label), data_run=number)
        for number, run in enumerate(runs)
    ]
    return element(
        "form",
        element("fieldset", element("legend", "Runs"), choices, class_="runs")
        if len(runs) > 1 else None,
        element(
            "fieldset",
            element("legend", "Step"),
            element("input", type="range", id="cursor", min=1, max=1, value=1, step=1,
                    aria_label="step of the cursor in all charts"),
            element("output", "no step chosen", id="cursor-step", for_="cursor"),
        ),
        element(
            "fieldset",
            element("legend", "Zoom"),
            [
                element("button", words, type="button", data_zoom=key, title=told)
                for key, words, told in (
                    ("in", "+", "zoom in around the cursor"), ("out", "−", "zoom out"),
                    ("left", "←", "move to earlier steps"), ("right", "→", "move to later steps"),
                    ("all", "all steps", "show all steps"),
                )
            ],
        ),
        id="toolbar", aria_label="all charts",
    )  # fmt: skip


def _chart(chart: Any, several: bool) -> Html:
    series = [
        _checkbox(
            together(_sample(key, number, several), words),
            data_series=key,
        )
        for number, (key, words) in enumerate(chart.series.items())
    ]  # fmt: skip
    return element(
        "figure",
        element("figcaption", element("h3", chart.title),
                element("p", " ".join(chart.notes)) if chart.notes else None),
        element(
            "div",
            _checkbox("log axis", data_log=True, checked=chart.log)
            if chart.log is not None else None,
            _checkbox("range of bf16 too", data_wide=True, checked=False)
            if chart.key == "exponents" else None,
            series if len(series) > 1 else None,
            class_="choices",
        ),
        element("div", class_="plot", data_root=chart.figure.id),
        element("p", class_="readout", aria_live="polite"),
        data_chart=chart.key, class_="chart",
    )  # fmt: skip


def _sample(key: str, number: int, several: bool) -> Html:
    """What a curve looks like, beside its name."""
    if key in ("skipped", "nonfinite"):
        return element("i", "×", class_="cross" if several else "cross red", aria_hidden="true")
    if key in ("resumed", "rolled back"):
        return element("i", class_=f"swatch dash2 c{number % 8}" if not several else "swatch dash2")
    if several:  # colours are those of runs
        return element("i", class_=f"swatch dash{number % 4}", aria_hidden="true")
    return tables.swatch(number)


def _checkbox(label: Content, *, checked: bool = True, **attributes: Any) -> Html:
    box = element("input", type="checkbox", checked=checked, **attributes)
    return element("label", box, " ", label)


def _layer_controls(runs: Sequence[Run], layers: Sequence[list[dict[str, Any]]]) -> Html:
    kinds = [k for k in _TENSORS if any(t["tensor"] == k for own in layers for t in own)]
    names = [(str(n), run.label) for n, run in enumerate(runs) if layers[n]]
    return element(
        "form",
        _select("layers-run", "Run", names),
        _select("layers-tensor", "Tensors", [(kind, _TENSORS[kind]) for kind in kinds]),
        _select("layers-name", "Exponents of", []),
        _select("layers-quantity", "Map of", []),
        element("p", _sampled(runs, layers)),
        class_="controls", aria_label="numbers by layer",
    )  # fmt: skip


def _select(name: str, label: str, options: Iterable[tuple[str, str]]) -> Html:
    listed = [element("option", words, value=value) for value, words in options]
    return element("label", f"{label} ", element("select", listed, id=name))


def _sampled(runs: Sequence[Run], layers: Sequence[list[dict[str, Any]]]) -> str:
    most = MOST_LAYER_ROWS // max(1, len(runs))
    thinned = any(run.layers and run.layers.num_rows > most for run in runs)
    told = (
        f"Of the sampled steps; a share is one of 62 levels of its logarithm, from "
        f"{SMALLEST_SHARE:g} to 1. Gradients are as backward left them: with the loss scale."
    )
    if thinned:
        told += " Neighbouring sampled steps are shown as one, with the largest value of each."
    return told


def _thinned(charts: Any) -> Html | None:
    shown = sum(map(len, charts.thinned))
    total = sum(charts.num_steps)
    if shown == total:
        return None
    return element(
        "p",
        f"Curves show {shown:,} of {total:,} steps: of each stretch the smallest and the largest "
        "value of every curve, and every step that was skipped or whose loss was not finite.",
        class_="note",
    )
