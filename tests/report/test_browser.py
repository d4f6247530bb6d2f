"""A report of a real run with a skip, a resume and a finding, in a real browser.

Screenshots are left in the folder of the test (`--basetemp`), to be looked at.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpcli.report.page import report_page
from mpcli.report.sources import read_sources
from mpcli.rundir import RunDirectory
from tests.report.conftest import Page
from tests.report.synthetic import made_up_run, step_row
from tests.small import RECIPE, resume_small, run_small

pytestmark = pytest.mark.slow
STORM = "fp16, loss_scale: {kind: dynamic, init_scale: 1048576, growth_interval: 1}"
CHARTS = {
    "loss", "metric0", "scale", "grad_norm", "update_ratio", "lr", "exponents", "layers", "speed",
    "memory",
}  # fmt: skip
POINTS = """() => Object.fromEntries(Bokeh.documents[0].roots().map((figure) => [figure.name,
  figure.renderers.map((renderer) => renderer.data_source.get_length())]))"""
DRAWN = """() => [...document.querySelectorAll(".plot")].map((place) => {
  const found = [];
  const walk = (node) => {
    if (node.tagName === "CANVAS") found.push(node);
    for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) walk(child);
  };
  walk(place);
  return found.some((canvas) => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return new Set(new Uint32Array(pixels.buffer)).size > 10;
  });
})"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 24 steps, of which the last eight are a resume."""
    folder = tmp_path_factory.mktemp("report")
    text = RECIPE.replace("mode: fp32", f"mode: {STORM}").replace("steps: 4", "steps: 16")
    settings = ("probe.every=4", "eval.every=8 steps", "output.checkpoint_every=8 steps")
    run, _ = run_small(folder, *settings, text=text)
    run.close()
    resume_small(RunDirectory(run.path), "train.steps=24")
    command = [sys.executable, "-m", "mpcli", "diagnose", "--no-replay", "--json", str(run.path)]
    with (run.path / "diagnosis.json").open("w") as file:
        subprocess.run(command, check=True, stdout=file)
    file = folder / "report.html"
    file.write_text(report_page(read_sources([run.path])))
    return file


@pytest.mark.parametrize(("width", "scheme"), [(1600, "light"), (800, "dark")])
def test_every_chart_has_data_and_nothing_complains(
    report: Path, opened: Any, width: int, scheme: str
) -> None:
    shown = opened(report, width, scheme)
    check_page(shown, report)
    shown.page.screenshot(path=report.parent / f"{width}-{scheme}.png", full_page=True)


def check_page(shown: Page, file: Path) -> None:
    """All charts of a run with a skip, a resume and a storm of skips are there, with their data."""
    points = shown.page.evaluate(POINTS)
    assert set(points) == CHARTS
    assert all(counts and all(counts) for counts in points.values()), points
    assert all(shown.page.evaluate(DRAWN))
    names = shown.page.evaluate(
        "() => Bokeh.documents[0].roots().find((r) => r.name === 'scale').renderers"
        ".map((r) => r.name)"
    )
    assert {"loss scale", "skipped steps", "resumed or restarted"} <= set(names)
    assert "skip-storm" in shown.page.inner_text(".finding")
    width = shown.page.viewport_size["width"]
    assert shown.page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert not shown.complaints
    assert shown.requests == [file.as_uri()]


def check_keyboard(page: Any) -> None:
    """The tabulator key gets to every control."""
    controls = "input, select, button, summary"
    page.evaluate(
        "(controls) => document.querySelectorAll(controls).forEach((c, n) => c.id ||= `c${n}`)",
        controls,
    )
    wanted = set(page.eval_on_selector_all(controls, "(found) => found.map((c) => c.id)"))
    reached = set()
    for _ in range(3 * len(wanted)):  # summaries and scrolling regions are stops too
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id"))
    assert wanted <= reached


def test_a_keyboard_reaches_and_works_every_control(report: Path, opened: Any) -> None:
    page = opened(report).page
    check_keyboard(page)

    page.focus("#cursor")
    for _ in range(11):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#cursor-step") == "step 12"
    assert page.inner_text('[data-chart="loss"] .readout').startswith("training ")
    spans = "() => Bokeh.documents[0].get_model_by_name('cursor')"
    assert page.evaluate(f"{spans}.location") == 12

    page.focus('[data-chart="loss"] [data-log]')
    page.keyboard.press("Space")
    figure = "Bokeh.documents[0].roots().find((r) => r.name === 'loss')"
    assert page.evaluate(f"() => {figure}.y_scale.type") == "LogScale"
    page.focus('[data-chart="loss"] [data-series="loss"]')
    page.keyboard.press("Space")
    assert page.evaluate(f"() => {figure}.renderers[0].visible") is False

    page.focus('[data-zoom="in"]')
    page.keyboard.press("Enter")
    shown = page.evaluate("() => { const r = Bokeh.documents[0].get_model_by_name('steps'); "
                          "return [r.start, r.end]; }")  # fmt: skip
    assert shown[0] < 12 < shown[1] and shown[1] - shown[0] < 15

    page.focus("#layers-tensor")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#layers-tensor") == "grad_output"
    assert page.evaluate(POINTS)["exponents"] != [0]


def test_a_mouse_moves_the_cursor_of_all_charts(report: Path, opened: Any) -> None:
    shown = opened(report)
    plot = shown.page.locator('[data-chart="grad_norm"] .plot')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    shown.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shown.page.wait_for_function("() => document.querySelector('#cursor').dataset.chosen")
    assert "step" in shown.page.inner_text("#cursor-step")
    assert shown.page.inner_text('[data-chart="lr"] .readout').startswith("learning rate")
    assert not shown.complaints


def test_values_below_the_charts_are_those_at_the_cursor(tmp_path: Path, opened: Any) -> None:
    path = made_up_run(tmp_path / "run", steps=8, sampled=4, layers=1)
    losses = [math.nan, 12340.2, math.nan, 1.5, 1.25, 1.0, 0.75, 0.5]
    rows = [step_row(n + 1, loss=loss) + "\n" for n, loss in enumerate(losses)]
    (path / "steps.jsonl").write_text("".join(rows))
    layers = [json.loads(row) for row in (path / "layers.jsonl").read_text().splitlines()]
    overflowed = [row | {"max": math.inf} if row["step"] == 3 else row for row in layers]
    (path / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in overflowed))
    file = tmp_path / "report.html"
    file.write_text(report_page(read_sources([path])))
    page = opened(file).page
    page.select_option("#layers-quantity", "range")

    def told(chart: str, step: int) -> str:
        page.fill("#cursor", str(step))
        return str(page.inner_text(f'[data-chart="{chart}"] .readout'))

    assert told("loss", 1) == "training not finite · loss not finite here"
    assert told("loss", 2) == "training 12340"
    assert told("loss", 4) == "training 1.5"
    names = "block.0.attention.output.dense"
    assert told("layers", 4).startswith(f"at step 3: {names}.weight not finite · {names}.bias")
    page.select_option("#layers-tensor", "weight")
    assert re.fullmatch(
        r"at step 3: (2\^-\d+ [\d.]+% · ){5}\d+ smaller ones",
        page.inner_text('[data-chart="exponents"] .readout'),
    )


def test_a_tensor_without_a_number_is_what_the_layers_begin_with(
    tmp_path: Path, opened: Any
) -> None:
    path = made_up_run(tmp_path / "run", steps=4, sampled=2, layers=1)
    rows = [json.loads(row) for row in (path / "layers.jsonl").read_text().splitlines()]
    rows = [row | {"sampled": 1000, "lowest_exponent": -3, "exponents": [250]} for row in rows]
    for row in rows:
        if row["step"] == 3:
            row |= {"nan": row["elements"], "zeros": 0, "lowest_exponent": None, "exponents": []}
    (path / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "report.html"
    file.write_text(report_page(read_sources([path])))
    page = opened(file).page
    assert page.input_value("#layers-quantity") == "nonfinite"
    cells = """([chart, key]) => {
      const { data_source } = Bokeh.documents[0].roots().find((r) => r.name === chart).renderers[0];
      return [...data_source.get(key)];
    }"""
    shares = page.evaluate(cells, ["exponents", "value"])
    assert shares[0] == pytest.approx(0.25, rel=0.1) and math.isnan(shares[1])
    assert page.evaluate(cells, ["exponents", "hatch"]) == [" ", "x"]
    assert page.evaluate(cells, ["layers", "value"]) == [0, 1, 0, 1]
    page.select_option("#layers-quantity", "zeros")
    assert set(page.evaluate(cells, ["layers", "step"])) == {1}
    page.fill("#cursor", "3")
    told = page.inner_text('[data-chart="exponents"] .readout')
    assert told == "at step 3: all values are NaN or infinite"


def test_buttons_zoom_and_move_and_the_curves_fill_their_charts(
    tmp_path: Path, opened: Any
) -> None:
    path = made_up_run(tmp_path / "run", steps=100, sampled=1, layers=1)
    losses = [1000.0 if step < 50 else 2 + step / 100 for step in range(1, 101)]
    rows = [step_row(n + 1, loss=loss) + "\n" for n, loss in enumerate(losses)]
    (path / "steps.jsonl").write_text("".join(rows))
    (path / "evals.jsonl").unlink()
    file = tmp_path / "report.html"
    file.write_text(report_page(read_sources([path])))
    page = opened(file).page
    model = "const m = Bokeh.documents[0].get_model_by_name('loss')"

    def pressed(key: str) -> tuple[list[float], list[float]]:
        page.click(f'[data-zoom="{key}"]')
        return tuple(page.evaluate(f"() => {{ {model}; return [m.x_range, m.y_range]"
                                   ".map((r) => [r.start, r.end]); }"))  # fmt: skip

    whole, high = pressed("all")
    assert high[0] < 0.5 and high[1] > 1000
    page.fill("#cursor", "80")
    near, low = pressed("in")
    assert near[1] - near[0] == pytest.approx((whole[1] - whole[0]) / 2)
    near, low = pressed("in")
    assert near[0] > 50 and 2.5 < low[0] < low[1] < 3.1
    later, _ = pressed("right")
    assert later[0] > near[0]
    earlier, _ = pressed("left")
    assert earlier == pytest.approx(near)
    page.eval_on_selector(
        '[data-zoom="in"]', "(b) => { for (let n = 0; n < 60; n += 1) b.click(); }"
    )
    least, _ = pressed("in")
    assert least[1] - least[0] == 1
    assert pressed("all") == (whole, high)

    plot = page.locator('[data-chart="loss"] .plot')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 90, steps=5)
    page.mouse.up()
    page.wait_for_function(
        f"() => {{ {model}; return m.x_range.start > 60 && m.y_range.end < 4; }}"
    )


RANGES = """(name) => {
  const { x_range, y_range } = Bokeh.documents[0].roots().find((root) => root.name === name);
  return [x_range.start, x_range.end, y_range.start, y_range.end];
}"""


def test_what_is_not_seen_has_no_part_in_the_range(tmp_path: Path, opened: Any) -> None:
    good, short = (made_up_run(tmp_path / name, steps=9, sampled=1) for name in ("good", "short"))
    early = {"loss": 1e4, "scale": 2.0**24}
    rows = [
        step_row(n, skipped=n < 6, **(early if n < 31 else {"loss": 2 + n / 1e4, "scale": 1024.0}))
        for n in range(1, 1001)
    ]
    rows[29] = step_row(30, loss=math.nan)
    (good / "steps.jsonl").write_text("\n".join(rows) + "\n")
    rows = [step_row(n, loss=2.0 if n < 95 else 1e4, scale=2.0**20) for n in range(1, 101)]
    (short / "steps.jsonl").write_text("\n".join(rows) + "\n")
    for run in (good, short):
        (run / "evals.jsonl").unlink()
    file = tmp_path / "report.html"
    file.write_text(report_page(read_sources([good, short])))
    page = opened(file).page
    show = "([start, end]) => Bokeh.documents[0].get_model_by_name('steps').setv({ start, end })"

    def heights(*shown: float) -> list[list[float]]:
        page.evaluate(show, shown)
        return [page.evaluate(RANGES, name)[2:] for name in ("loss", "scale")]

    loss, scale = heights(600, 700)
    assert 2.05 < loss[0] < loss[1] < 2.08
    assert scale == [512, 2048]
    loss, _ = heights(30.5, 31.5)  # beside the mark of step 30: the line of the short run only
    assert loss[1] < 2.1
    loss, _ = heights(94.2, 94.8)  # between two points of a line that goes up
    assert loss[1] > 1e4


def test_a_double_click_leaves_a_chart_as_it_is(tmp_path: Path, opened: Any) -> None:
    run = made_up_run(tmp_path / "run", steps=300, sampled=10)
    (tmp_path / "sweep" / "trials").mkdir(parents=True)
    rows = [{"scale": 2.0**n, "measured": {"underflow": n / 160 + 5}} for n in range(8, 20)]
    sweep = {"kind": "loss-scale", "rows": rows}
    (tmp_path / "sweep" / "result.json").write_text(json.dumps(sweep))
    file = tmp_path / "report.html"
    file.write_text(report_page(read_sources([run, tmp_path / "sweep"])))
    page = opened(file).page
    for name in ("loss", "layers", "sweep0-underflow"):
        plot = page.locator(f'[data-chart="{name}"] .plot')
        plot.scroll_into_view_if_needed()
        page.wait_for_function("() => Bokeh.documents[0].is_idle")
        page.wait_for_timeout(300)
        box = plot.bounding_box()
        height = box["y"] + box["height"] / 2
        whole = page.evaluate(RANGES, name)
        page.mouse.move(box["x"] + box["width"] * 0.4, height)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.6, height, steps=5)
        page.mouse.up()
        page.wait_for_timeout(300)
        dragged = page.evaluate(RANGES, name)
        assert (dragged == whole) == name.startswith("sweep")
        page.mouse.dblclick(box["x"] + box["width"] * 0.5, height)
        page.wait_for_timeout(300)
        assert page.evaluate(RANGES, name) == dragged
        page.click('[data-zoom="all"]')
        assert page.evaluate(RANGES, name) == whole


def test_charts_follow_the_theme(report: Path, opened: Any) -> None:
    page = opened(report, scheme="dark").page
    axis = "() => Bokeh.documents[0].get_model_by_name('loss').left[0].major_label_text_color"
    text = "() => getComputedStyle(document.documentElement).getPropertyValue('--text')"
    assert page.evaluate(axis) == page.evaluate(text) == "#e4e9ef"
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"() => ({axis})() === '#1b1f24'")
    page.emulate_media(color_scheme="dark")
    plot = page.locator('[data-chart="layers"] .plot')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 40)
    tooltip = page.wait_for_selector(".bk-Tooltip")
    assert tooltip.evaluate("(t) => getComputedStyle(t).backgroundColor") == "rgb(26, 32, 40)"
