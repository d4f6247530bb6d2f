"""The charts, as Bokeh's models. Colours that depend on the theme are set by the page's script.

No text from outside becomes part of a figure's own text (titles, labels, axes), where Bokeh would
look for TeX. Names of runs are there as names of renderers, which the script shows as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTickFormatter,
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    FixedTicker,
    HoverTool,
    LogAxis,
    LogColorMapper,
    LogScale,
    LogTicker,
    LogTickFormatter,
    Range1d,
    Scatter,
    VSpan,
)
from bokeh.models.annotations import ColorBar, Label, Span
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from mpcli.report.layers import SMALLEST_SHARE
from mpcli.report.sources import Run, Sweep

COLORS = (
    "#3b82f6", "#d97706", "#16a34a", "#e0483d", "#9b5de5", "#0d9488", "#db2777", "#8a7a1f",
)  # fmt: skip
"""Of runs, or of the curves of one; readable on white and on black."""
DASHES = ("solid", "dashed", "dotted", "dotdash")
_MOST_POINTS = 4000  # buckets of all runs together
_HEIGHT = 260


@dataclass
class Chart:
    """A figure and what the page has to know of it.

    Attributes:
        series: key -> (words, number of its dash or marker).
        log: whether its axis begins as a logarithmic one; None: it cannot be one.
    """

    key: str
    title: str
    figure: figure
    series: dict[str, str] = field(default_factory=dict)
    log: bool | None = None
    note: str | None = None

    @property
    def notes(self) -> list[str]:
        """What stands above it, in sentences."""
        notes = [self.note] if self.note else []
        if self.log is not None and any(map(_has_zero, self.figure.renderers)):
            notes.append("A log axis leaves out what is not above 0.")
        return notes


class StepCharts:
    """Charts over the steps of all runs: they share the range of steps, and a cursor."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.last = last = max([_last_step(run) for run in runs], default=1.0)
        edge = max(0.5, last / 100)
        self.steps = Range1d(
            start=1 - edge, end=last + edge, bounds=(1 - edge, last + edge), min_interval=1,
            name="steps",
        )  # fmt: skip
        self.cursor = Span(dimension="height", level="overlay", line_dash="dashed", name="cursor")
        buckets = min(400, max(20, _MOST_POINTS // max(1, len(runs))))
        self.thinned = [run.steps.thinned(buckets) for run in runs]
        self.num_steps = [len(run.steps) for run in runs]
        self.sources = [
            _source({name: column for name, column in steps.columns.items() if name != "attempt"})
            for steps in self.thinned
        ]

    def training(self) -> Iterator[Chart]:
        """Loss and metrics, with what interrupted them."""
        chart = self._chart("loss", "Loss", log=False)
        self._curve(chart, "loss", "training")
        if any(run.evaluations for run in self.runs):
            self._evaluations(chart, "loss", "evaluation")
        self._nonfinite(chart)
        self._boundaries(chart)
        yield chart
        for number, name in enumerate(self._metrics()):
            chart = self._chart(f"metric{number}", f"Evaluation: {name}", log=False)
            self._evaluations(chart, name, "evaluation")
            yield chart
        if self._any("scale"):
            chart = self._chart("scale", "Loss scale", log=True, base=2)
            self._curve(chart, "scale", "loss scale", step=True)
            self._skips(chart)
            self._boundaries(chart)
            yield chart
        if self._any("grad_norm"):
            chart = self._chart("grad_norm", "Gradient norm", log=True)
            self._curve(chart, "grad_norm", "norm before clipping")
            yield chart
        ratios = [run.layers.update_ratios() if run.layers else {} for run in self.runs]
        if any(ratio.get("step") for ratio in ratios):
            note = "Root mean square of a step's update over that of the weights, at sampled steps."
            chart = self._chart("update_ratio", "Update over weight", log=True, note=note)
            for run, ratio in enumerate(ratios):
                if ratio.get("step"):
                    source = _source({name: np.array(values) for name, values in ratio.items()})
                    for name in ("largest", "median", "smallest"):
                        words = f"{name} of all layers"
                        self._line(chart, run, source, name, name, words, marked=True)
            yield chart
        if self._any("lr"):
            chart = self._chart("lr", "Learning rate", log=False)
            self._curve(chart, "lr", "learning rate")
            yield chart

    def speed(self) -> Iterator[Chart]:
        """Throughput and memory."""
        if self._any("samples_per_second"):
            chart = self._chart("speed", "Samples per second", log=False)
            self._curve(chart, "samples_per_second", "samples per second")
            yield chart
        if self._any("memory_peak_bytes", positive=True):
            chart = self._chart("memory", "Memory (MiB)", log=False)
            for source in self.sources:
                for name in ("memory_allocated_bytes", "memory_peak_bytes"):
                    source.data[name] = np.asarray(source.data[name], np.float32) / 2**20
            self._curve(chart, "memory_peak_bytes", "peak so far", width=5)
            self._curve(chart, "memory_allocated_bytes", "allocated")
            for run, about in enumerate(self.runs):
                if about.planned_peak and len(about.steps):
                    peak = about.planned_peak / 2**20
                    ends = np.array([1.0, _last_step(about)])
                    source = _source({"step": ends, "planned": np.array([peak, peak])})
                    self._line(chart, run, source, "planned", "planned", "planned peak")
            yield chart

    def exponents(self) -> Chart:
        """How many values of a tensor have an exponent, over time; the script fills it."""
        note = "Hatched: all values are NaN or infinite. Zeros have no exponent."
        chart = self._chart("exponents", "Exponents of one tensor over time", note=note)
        plot = chart.figure
        plot.y_range.update(start=-30, end=20)
        plot.yaxis.axis_label = "log2 |value|"
        plot.grid.visible = False
        plot.height = 380
        mapper = LogColorMapper(
            palette=Viridis256, low=SMALLEST_SHARE, high=1.0, nan_color="#00000000"
        )
        cells = ColumnDataSource({n: [] for n in (*_CELL, "hatch")}, name="exponents-cells")
        drawn = plot.quad(
            left="left", right="right", bottom="bottom", top="top", source=cells,
            color={"field": "value", "transform": mapper}, line_width=0.5, name="exponents",
            hatch_pattern="hatch", hatch_color=COLORS[3], hatch_alpha=0.8,
        )  # fmt: skip
        for name, exponent, words in LIMITS:
            limit = Span(location=exponent, dimension="width", line_width=1.5, tags=["limit"])
            limit.line_dash = "solid" if name == "fp16" else "dashed"
            plot.add_layout(limit)
            plot.add_layout(
                Label(
                    x=6, x_units="screen", y=exponent, y_units="data", text=words, y_offset=2,
                    text_font_size="11px", background_fill_alpha=0.7, tags=["limit"],
                )
            )  # fmt: skip
        plot.add_layout(_color_bar(mapper, "share of the values"), "right")
        plot.add_tools(
            HoverTool(renderers=[drawn], tooltips=[("step", "@step{0,0}"), ("", "@words")])
        )
        return chart

    def layer_map(self) -> Chart:
        """A quantity of every tensor over time; the script fills it."""
        note = "Grey is 0. Where nothing is drawn, nothing is known, or no value is finite."
        chart = self._chart("layers", "All tensors over time", note=note)
        plot = chart.figure
        plot.grid.visible = False
        plot.yaxis.ticker = FixedTicker(ticks=[])
        mapper = LogColorMapper(palette=Viridis256, low=SMALLEST_SHARE, high=1.0, name="layers-log")
        cells = ColumnDataSource({n: [] for n in (*_CELL, "shade")}, name="layers-cells")
        drawn = plot.quad(
            left="left", right="right", bottom="bottom", top="top", source=cells,
            color={"field": "shade", "transform": mapper}, line_width=0.5, name="layers",
        )  # fmt: skip
        plot.add_layout(_color_bar(mapper, None), "right")
        plot.add_tools(
            HoverTool(renderers=[drawn], tooltips=[("step", "@step{0,0}"), ("", "@words")])
        )
        return chart

    def _chart(
        self, key: str, title: str, *, log: bool | None = None, base: int = 10,
        note: str | None = None,
    ) -> Chart:  # fmt: skip
        plot = _figure(key, log=log, base=base, x_range=self.steps, x_axis_label="step")
        plot.add_tools(BoxZoomTool(dimensions="width"), CrosshairTool(overlay=self.cursor))
        return Chart(key, title, plot, log=log, note=note)

    def _curve(self, chart: Chart, column: str, words: str, **style: Any) -> None:
        for run, source in enumerate(self.sources):
            self._line(chart, run, source, column, column, words, **style)

    def _line(
        self, chart: Chart, run: int, source: ColumnDataSource, column: str, key: str, words: str,
        *, step: bool = False, marked: bool = False, width: float = 1.5,
    ) -> None:  # fmt: skip
        number = _series(chart, key, words)
        color = COLORS[(run if len(self.runs) > 1 else number) % len(COLORS)]
        about = {"run": run, "series": key, "column": column}
        common: dict[str, Any] = {"source": source, "name": self._name(run, words)}
        dash = DASHES[number % len(DASHES)] if len(self.runs) > 1 else "solid"
        style: dict[str, Any] = {
            "line_color": color,
            "line_dash": dash,
            "line_width": width,
            **common,
        }
        if step:
            chart.figure.step("step", column, mode="after", **style).tags = [about]
        else:
            chart.figure.line("step", column, **style).tags = [about]
        # A line shows no point between two that are not finite.
        data = {name: np.asarray(source.data[name]) for name in ("step", column)}
        alone = np.arange(len(data["step"])) if marked else _alone(data[column])
        if len(alone):
            points = _source({name: values[alone] for name, values in data.items()})
            style = {"size": 5 if marked else 3, "color": color, **common, "source": points}
            chart.figure.scatter("step", column, **style).tags = [about]

    def _name(self, run: int, words: str) -> str:
        return f"{self.runs[run].label}: {words}" if len(self.runs) > 1 else words

    def _evaluations(self, chart: Chart, metric: str, words: str) -> None:
        for run, about in enumerate(self.runs):
            rows = [row for row in about.evaluations if metric in row.metrics]
            if rows:
                values = np.array([row.metrics[metric] for row in rows], np.float64)
                source = _source({"step": np.array([float(row.step) for row in rows]), "v": values})
                self._line(chart, run, source, "v", "evaluation", words, marked=True)

    def _skips(self, chart: Chart) -> None:
        """A cross at the scale of every step that was skipped."""
        for run, about in enumerate(self.runs):
            skipped = about.steps.skipped
            if len(skipped):
                source = _source({"step": skipped["step"], "scale": skipped["scale"]})
                self._marks(chart, run, source, "scale", "skipped", "skipped steps")

    def _nonfinite(self, chart: Chart) -> None:
        """A cross for every loss that is not finite, at the last one that was, else the first."""
        for run, about in enumerate(self.runs):
            loss = about.steps["loss"]
            finite = np.isfinite(loss)
            before = np.maximum.accumulate(np.where(finite, np.arange(len(loss)), -1))
            bad = np.flatnonzero(~finite)
            if len(bad):
                first = loss[finite][0] if finite.any() else 1.0
                height = np.where(before >= 0, loss[before], first)
                source = _source({"step": about.steps["step"][bad], "loss": height[bad]})
                self._marks(chart, run, source, "loss", "nonfinite", "loss not finite")

    def _marks(
        self, chart: Chart, run: int, source: ColumnDataSource, column: str, key: str, words: str
    ) -> None:
        _series(chart, key, words)
        color = COLORS[3] if len(self.runs) == 1 else COLORS[run % len(COLORS)]
        chart.figure.add_glyph(
            source,
            Scatter(x="step", y=column, marker="x", size=9, line_color=color, line_width=2),
            name=self._name(run, words),
            tags=[{"run": run, "series": key, "column": column}],
        )

    def _boundaries(self, chart: Chart) -> None:
        """Lines where another attempt began, and where the run went back to a checkpoint."""
        for run, about in enumerate(self.runs):
            rolled_back = np.array([float(row.step) for row in about.rollbacks])
            for key, words, steps in (
                ("resumed", "resumed or restarted", about.steps.resumed),
                ("rolled back", "rolled back", rolled_back),
            ):
                if len(steps):
                    number = _series(chart, key, words)
                    chart.figure.add_glyph(
                        _source({"step": steps}),
                        VSpan(
                            x="step", line_width=1.5, line_dash="dotted",
                            line_color=COLORS[(run if len(self.runs) > 1 else number)
                                              % len(COLORS)],
                        ),
                        name=self._name(run, words),
                        tags=[{"run": run, "series": key}],
                    )  # fmt: skip

    def _metrics(self) -> list[str]:
        names = [n for run in self.runs for row in run.evaluations for n in row.metrics]
        return [name for name in dict.fromkeys(names) if name != "loss"]

    def _any(self, column: str, *, positive: bool = False) -> bool:
        columns = [run.steps[column] for run in self.runs]
        return any(bool(np.any(np.isfinite(c) & ((c > 0) | (not positive)))) for c in columns)


LIMITS = (
    ("fp16", 16, "fp16: infinite from here"),
    ("fp16", -14, "fp16: subnormal below"),
    ("fp16", -25, "fp16: zero below"),
    ("bf16", 128, "bf16, fp32: infinite from here"),
    ("bf16", -126, "bf16, fp32: subnormal below"),
)
"""Exponents at which a format ends."""
_CELL = ("left", "right", "bottom", "top", "value", "step", "words")


def sweep_charts(sweep: Sweep, number: int) -> Iterator[Chart]:
    """A sweep of loss scales: what was predicted beside what its runs showed, and their losses."""
    rows = [row for row in sweep.rows if _is_positive(row.get("scale"))]
    rows.sort(key=lambda row: row["scale"])
    if not rows:
        return
    scales = np.log2([float(row["scale"]) for row in rows])
    for name, what in (("underflow", "become zero"), ("overflow", "become infinite")):
        curves = {
            f"{kind}": [_value(row.get(kind), name) for row in rows]
            for kind in ("predicted", "measured")
        }
        title = f"{sweep.label}: gradients that {what}"
        yield from _sweep_chart(f"sweep{number}-{name}", title, scales, curves, log=False)
    for name, title in (("loss", "loss"), ("skip_rate", "share of the steps that were skipped")):
        curves = {name: [_value(row, name) for row in rows]}
        title = f"{sweep.label}: {title}"
        yield from _sweep_chart(f"sweep{number}-{name}", title, scales, curves, log=False)


def _sweep_chart(
    key: str, title: str, x: np.ndarray[Any, Any], curves: dict[str, list[float]], *, log: bool
) -> Iterator[Chart]:
    shown = {name: values for name, values in curves.items() if any(map(math.isfinite, values))}
    if not shown:
        return
    plot = _figure(key, log=log, x_axis_label="log2 of the loss scale")
    chart = Chart(key, title, plot, log=log)
    source = _source({"step": x, **{name: np.array(values) for name, values in shown.items()}})
    for name in shown:
        number = _series(chart, name, name)
        style: dict[str, Any] = {
            "source": source,
            "name": name,
            "color": COLORS[number % len(COLORS)],
        }
        about = {"series": name, "column": name}
        drawn = plot.line("step", name, line_width=1.5, **style)
        drawn.tags = [about]
        plot.scatter("step", name, size=7, **style).tags = [about]
    tooltips = [("log2", "@step"), *[(name, f"@{name}{{0.[00000]}}") for name in shown]]
    plot.add_tools(HoverTool(renderers=[drawn], mode="vline", tooltips=tooltips))
    yield chart


def _figure(key: str, *, log: bool | None, base: int = 10, **options: Any) -> figure:
    """A figure without a toolbar: the page has its own controls, for a keyboard too."""
    plot = figure(
        y_range=Range1d(start=1, end=2),  # the script fits it to what is seen
        border_fill_color=None,  # the page's
        height=_HEIGHT, sizing_mode="stretch_width", toolbar_location=None, name=key,
        tools=[], **options,
    )  # fmt: skip
    plot.xaxis.formatter = BasicTickFormatter(use_scientific=False)
    plot.min_border_right = 20
    plot.axis.axis_label_text_font_style = "normal"
    if log is not None:
        linear_axis = plot.yaxis[0]
        log_axis = LogAxis(visible=log, ticker=LogTicker(base=base))
        log_axis.formatter = LogTickFormatter(ticker=log_axis.ticker)
        linear_axis.visible = not log
        plot.add_layout(log_axis, "left")
        scales = {"linear": plot.y_scale, "log": LogScale()}
        plot.y_scale = scales["log" if log else "linear"]
        # What the script swaps when a person asks for the other axis.
        plot.tags = [{"scales": scales, "axes": {"linear": linear_axis, "log": log_axis}}]
    return plot


def _series(chart: Chart, key: str, words: str) -> int:
    """Its number within the chart."""
    chart.series.setdefault(key, words)
    return list(chart.series).index(key)


def _alone(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Indices of the finite values without a finite neighbour."""
    finite = np.isfinite(np.concatenate([[np.nan], values, [np.nan]]))
    return np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])


def _has_zero(drawn: Any) -> bool:
    column = drawn.tags[0].get("column")
    return column is not None and bool(np.any(np.asarray(drawn.data_source.data[column]) <= 0))


def _source(columns: dict[str, np.ndarray[Any, Any]]) -> ColumnDataSource:
    """Steps are exact; values have seven digits, and are missing where they are not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        data = {
            name: column if name == "step" else column.astype(np.float32)
            for name, column in columns.items()
        }
    for name, column in data.items():
        data[name] = np.where(np.isfinite(column), column, np.nan).astype(column.dtype)
    return ColumnDataSource(data)


def _color_bar(mapper: Any, title: str | None) -> ColorBar:
    return ColorBar(color_mapper=mapper, width=12, title=title, ticker=LogTicker())


def _last_step(run: Run) -> float:
    steps = [float(run.steps["step"][-1])] if len(run.steps) else []
    return max([1.0, *steps, *(float(row.step) for row in run.evaluations)])


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**1000


def _value(row: Any, name: str) -> float:
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, int | float) and abs(value) < 2**1000:
        return float(value)
    return math.nan
