"""What the charts draw, as Bokeh's models: where the limits lie, and what each line is of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bokeh.models.annotations import Span

from mpcli.records import MemoryPlan
from mpcli.report.charts import Chart, StepCharts, sweep_charts
from mpcli.report.sources import read_sources
from tests.report.synthetic import made_up_run, step_row
from tests.synthetic_runs import plan

MEMORY = MemoryPlan(
    weights=1, masters=0, gradients=1, optimizer=1, average=0, buffers=0, activations=1,
    temporary=0, peak=3 * 2**20, peak_at="backward",
)  # fmt: skip


def drawn(chart: Chart, name: str) -> Any:
    """What has a name in a chart; the lines come before their points."""
    return next(one for one in chart.figure.renderers if one.name == name)


def by_key(*charts: Chart) -> dict[str, Chart]:
    """Charts by their names."""
    return {chart.key: chart for chart in charts}


def test_the_limits_of_the_formats_are_drawn_where_they_are(tmp_path: Path) -> None:
    charts = StepCharts(read_sources([made_up_run(tmp_path / "run", steps=2)]).runs)
    limits = [one for one in charts.exponents().figure.center if isinstance(one, Span)]
    dashes = {one.location: one.line_dash for one in limits if one.tags == ["limit"]}
    assert sorted(dashes) == [-126, -25, -14, 16, 128]
    assert dashes[16] == dashes[-25] != dashes[128] == dashes[-126]


def test_interruptions_and_the_plan_are_drawn(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=5)
    (path / "attempts/1/plan.json").write_text(plan(memory=MEMORY).to_json())
    with (path / "steps.jsonl").open("a") as file:
        file.write(step_row(6, attempt=2) + "\n")
    rollback = {"step": 4, "attempt": 1, "checkpoint": 2, "reason": "nan"}
    (path / "rollbacks.jsonl").write_text(json.dumps(rollback) + "\n")
    charts = StepCharts(read_sources([path]).runs)
    found = by_key(*charts.training(), *charts.speed())
    for chart in (found["loss"], found["scale"]):
        for name, step in (("resumed or restarted", 6), ("rolled back", 4)):
            assert list(drawn(chart, name).data_source.data["step"]) == [step]
    planned = drawn(found["memory"], "planned peak").data_source.data
    assert (list(planned["step"]), list(planned["planned"])) == ([1, 6], [3, 3])


def test_what_was_measured_in_a_sweep_is_not_what_was_predicted(tmp_path: Path) -> None:
    rows = [
        {"scale": 2.0**n, "predicted": {"underflow": n / 8}, "measured": {"underflow": n / 16}}
        for n in (2, 1)
    ]
    (tmp_path / "trials").mkdir()
    (tmp_path / "result.json").write_text(json.dumps({"kind": "loss-scale", "rows": rows}))
    (sweep,) = read_sources([tmp_path]).sweeps
    (chart,) = sweep_charts(sweep, 0)
    for name, values in (("predicted", [0.125, 0.25]), ("measured", [0.0625, 0.125])):
        line = drawn(chart, name)
        assert list(line.data_source.data["step"]) == [1, 2]
        assert list(line.data_source.data[line.glyph.y]) == values


def test_zeros_that_a_log_axis_leaves_out_are_told(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=3)
    rows = [step_row(n, grad_norm=float(n > 2), loss=math.nan) + "\n" for n in (1, 2, 3)]
    (path / "steps.jsonl").write_text("".join(rows))
    found = by_key(*StepCharts(read_sources([path]).runs).training())
    assert found["grad_norm"].notes == ["A log axis leaves out what is not above 0."]
    assert found["scale"].notes == []
