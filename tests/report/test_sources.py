"""Runs half written, damaged, foreign, or of several kinds."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpcli.comparison.sides import read_run
from mpcli.recipe.errors import UserError
from mpcli.records import ForeignModule, ForeignRun
from mpcli.report import tables
from mpcli.report.markup import together
from mpcli.report.page import report_page
from mpcli.report.sources import Sources, read_sources
from tests.report.synthetic import finding, made_up_run, result, step_row
from tests.report.test_charts import MEMORY
from tests.synthetic_runs import plan

FILES = (
    "steps.jsonl", "layers.jsonl", "evals.jsonl", "rollbacks.jsonl", "result.json", "recipe.yaml",
    "recipe.source.yaml", "attempts/1/plan.json", "attempts/1/environment.json",
    "attempts/1/observed.json", "attempts/1/resumed.json", "diagnosis.json", "foreign.json",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner,
                                                                max_size=3),
    max_leaves=9,
)  # fmt: skip


def said(found: Sources) -> str:
    """The page without its charts, which take a second."""
    runs = found.runs
    return together(
        tables.summary(found), tables.findings(found.diagnoses), tables.attempts(runs),
        map(tables.types, runs), tables.recipes(runs), tables.environments(runs),
        map(tables.sweep, found.sweeps),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small made-up run."""
    return made_up_run(tmp_path_factory.mktemp("run") / "run", steps=6, layers=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.sampled_from(FILES), st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode))
def test_junk_in_any_file_is_read_over(
    run: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / name).write_bytes(content)
    found = read_sources([copy])
    assert "copy" in said(found)
    for few in (1, 100_000):
        assert all(run.layers and run.layers.packed(few) is not None for run in found.runs)


@pytest.mark.parametrize("value", [10**400, -1, 0, 2**60], ids=["10^400", "-1", "0", "2^60"])
@pytest.mark.parametrize("name", ["steps.jsonl", "layers.jsonl"])
def test_rows_with_impossible_numbers_are_left_out_and_counted(
    run: Path, tmp_path: Path, name: str, value: int
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    row = json.loads((copy / name).read_text().splitlines()[0])
    with (copy / name).open("a") as file:
        file.write(json.dumps(row | {"step": value}) + "\n")
    (found,) = read_sources([copy]).runs
    assert f"{name}: 1 rows that cannot be read are left out" in found.missing
    assert len(found.steps) == 6


def test_a_killed_run_says_what_is_missing(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=6)
    for name in ("result.json", "layers.jsonl", "evals.jsonl"):
        (path / name).unlink()
    with (path / "steps.jsonl").open("a") as file:
        file.write(step_row(7)[:30])
    page = said(read_sources([path]))
    for told in ("result.json", "layers.jsonl: no step was sampled", "plan.json",
                 "steps.jsonl: 1 rows"):  # fmt: skip
        assert told in page


def test_a_killed_run_has_the_numbers_that_compare_has(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=60)
    for name in ("result.json", "evals.jsonl"):
        (path / name).unlink()
    (found,) = read_sources([path]).runs
    beside = read_run(path)
    assert found.metrics == beside.metrics
    assert found.wall_seconds == beside.about.wall_seconds is not None
    assert found.peak_memory_bytes == beside.peak_memory_bytes == 2 * 10**8


def test_a_damaged_record_is_told_and_the_other_run_is_shown(tmp_path: Path) -> None:
    paths = [made_up_run(tmp_path / name, steps=2) for name in ("a", "b")]
    (paths[0] / "foreign.json").write_text("{")
    damaged, whole = read_sources(paths).runs
    assert (damaged.state, whole.state) == ("unreadable", "done")
    assert "foreign.json: is not there, or cannot be read" in damaged.missing


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=2)
    (tmp_path / "latest").symlink_to("run")
    (found,) = read_sources([path, path, tmp_path / "latest"]).runs
    assert found.label == f"{tmp_path.name}/run"


def test_charts_of_numbers_that_no_axis_can_show(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=1)
    values = [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0]
    rows = [
        step_row(n + 2, loss=v, grad_norm=v, lr=v, scale=v, samples_per_second=v,
                 memory_peak_bytes=10**18) for n, v in enumerate(values)
    ]  # fmt: skip
    with (path / "steps.jsonl").open("a") as file:
        file.writelines(row + "\n" for row in rows)
    assert 'data-chart="loss"' in report_page(read_sources([path]))


@pytest.mark.parametrize(("losses", "height"), [([math.nan, math.inf], 1), ([math.nan, 3.0], 3)])
def test_losses_that_are_not_finite_from_the_first_on_have_crosses(
    tmp_path: Path, losses: list[float], height: float
) -> None:
    from mpcli.report.charts import StepCharts

    path = made_up_run(tmp_path / "run", steps=2)
    rows = [step_row(n + 1, loss=loss) + "\n" for n, loss in enumerate(losses)]
    (path / "steps.jsonl").write_text("".join(rows))
    chart = next(StepCharts(read_sources([path]).runs).training())
    (crosses,) = [drawn for drawn in chart.figure.renderers if drawn.name == "loss not finite"]
    bad = [n + 1 for n, loss in enumerate(losses) if not math.isfinite(loss)]
    assert list(crosses.data_source.data["step"]) == bad
    assert list(crosses.data_source.data["loss"]) == [height] * len(bad)


def test_a_run_of_no_steps_has_no_charts(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text("name: x\n")
    page = report_page(read_sources([path]))
    assert "steps.jsonl: no step was recorded" in page
    assert "data-chart" not in page[: page.index("<script")]


def test_a_color_of_the_summary_is_that_of_the_charts(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        made_up_run(tmp_path / name, steps=2)
    for name in ("steps.jsonl", "evals.jsonl"):
        (tmp_path / "a" / name).unlink()
    page = said(read_sources([tmp_path / name for name in ("a", "b", "c")]))
    rows = re.findall(r"<th scope=.row.>(<i class=.swatch (c\d)[^>]*></i>)?([abc])<", page)
    assert [(color, label) for _, color, label in rows] == [("", "a"), ("c0", "b"), ("c1", "c")]


def test_differences_of_recipes_come_first(tmp_path: Path) -> None:
    paths = [made_up_run(tmp_path / name, steps=n) for name, n in (("a", 5), ("b", 6))]
    page = said(read_sources(paths))
    assert page.index("<td>5</td><td>6</td>") < page.index("as it was written")
    same = said(read_sources([paths[0], shutil.copytree(paths[0], tmp_path / "c")]))
    assert "The recipes are the same." in same


def test_a_measured_time_is_no_difference_of_environments(tmp_path: Path) -> None:
    paths = [made_up_run(tmp_path / name, steps=2) for name in ("a", "b")]
    for number, path in enumerate(paths):
        about = {"torch": f"2.{number}", "types": {"fp16": {"relative_time": 1.5 + number}}}
        (path / "attempts/1/environment.json").write_text(json.dumps(about))
    page = said(read_sources(paths))
    differ, everything = page[page.rindex("What differs") :].split("all 2 facts")
    assert "2.0</td><td>2.1" in differ and "relative_time" not in differ
    assert "types.fp16.relative_time" in everything


def test_a_diagnosis_beside_the_run_is_shown_once(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=5)
    file = path / "diagnosis.json"
    file.write_text(json.dumps({"verdict": "bad", "findings": [{"id": "no"}, finding()]}))
    found = read_sources([file, path])
    (diagnosis,) = found.diagnoses
    assert (len(diagnosis.findings), diagnosis.unread) == (1, 1)
    page = said(found)
    assert page.count("gradients become zero") == 1
    assert "--set precision.loss_scale.kind=dynamic" in page
    assert "tried: it helps" in page


def test_a_sweep_has_its_rows_its_curves_and_its_trials(tmp_path: Path) -> None:
    trial = made_up_run(tmp_path / "sweep" / "trials" / "s0", steps=5)
    rows = [
        {"label": "2^4", "scale": 16.0, "predicted": {"underflow": 0.2},
         "measured": {"underflow": 0.3}, "loss": 1.0, "skip_rate": 0.0, "layers": [{"a": 1}]},
        {"label": "dynamic", "scale": None, "loss": 0.9},
    ]  # fmt: skip
    written = {"kind": "loss-scale", "recommended": {"set": ["a=1"]}, "rows": rows,
               "trials": [{"run": trial.name, "label": "2^4", "seed": 0}]}  # fmt: skip
    (tmp_path / "sweep" / "result.json").write_text(json.dumps(written))
    from mpcli.report.charts import sweep_charts

    found = read_sources([tmp_path / "sweep"])
    assert [run.label.endswith("sweep: 2^4, seed 0") for run in found.runs] == [True]
    charts = [chart for number, sweep in enumerate(found.sweeps)
              for chart in sweep_charts(sweep, number)]  # fmt: skip
    assert [chart.key for chart in charts] == [
        f"sweep0-{n}" for n in ("underflow", "loss", "skip_rate")
    ]
    page = said(found)
    assert "predicted.underflow" in page and "layers.0" not in page


def test_of_many_trials_the_recommended_ones_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcli.report.sources.MOST_TRIALS", 2)
    sweep = tmp_path / "sweep"
    trials = [
        {"run": name, "label": name, "seed": 0, "settings": [f"precision.loss_scale={name}"]}
        for name in ("d", "c", "b", "a")
    ]
    for trial in trials:
        made_up_run(sweep / "trials" / trial["run"], steps=2)
    told = {"recommended": {"set": "precision.loss_scale=b"}, "rows": [], "trials": trials}
    (sweep / "result.json").write_text(json.dumps(told))
    found = read_sources([sweep])
    assert [run.path.name for run in found.runs] == ["b", "d"]
    assert found.sweeps[0].missing == ("the curves of 2 of its 4 trials are left out",)


@pytest.mark.parametrize(
    ("content", "told"),
    [("{}", "no diagnosis"), ("[]", "no JSON object"), ("x", "is no JSON")],
)
def test_other_files_are_refused(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(UserError, match=told):
        read_sources([file])


def test_what_was_seen_is_held_against_what_was_planned(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=2)
    (path / "attempts/1/plan.json").write_text(plan(mode="fp16").to_json())
    seen = {
        "conv": {"stored": "fp32", "computed": "fp32", "gradient": "fp32"},
        "norm": {"stored": "fp32", "computed": "fp32", "gradient": "fp32"},
    }
    (path / "attempts/1/observed.json").write_text(json.dumps(seen))
    page = said(read_sources([path]))
    assert '<span class="differs">fp32, planned fp16</span>' in page
    assert "2 modules, 1 differ from the plan" in page


def test_types_of_a_loop_of_somebody_else_are_not_planned(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=2)
    module = ForeignModule(name="head", type="Linear", parameters=1, stored="fp32")
    about = ForeignRun(
        loop="pytorch", model="Net", parameters=1, optimizer="SGD", every=1, modules=(module,),
        scaler=None, settings={},
    )  # fmt: skip
    (path / "foreign.json").write_text(about.to_json())
    assert "1 modules, not observed; nothing was planned" in said(read_sources([path]))
    seen = {"head": {"stored": "fp32", "computed": "fp16", "gradient": "fp32"}}
    (path / "attempts/1/observed.json").write_text(json.dumps(seen))
    page = said(read_sources([path]))
    assert "1 modules, observed; nothing was planned" in page
    assert "<td>Linear</td><td>fp32</td><td>fp16</td><td>fp32</td>" in page


def test_fixes_that_were_tried_and_others_are_told(tmp_path: Path) -> None:
    arm = {
        "steps": 1, "skipped": 0, "loss": 1.0, "symptom": 0.5, "seconds_per_step": 1.0,
        "peak_memory_bytes": 1,
    }  # fmt: skip
    one, other = ({"what": f"set `{name}`", "set": [f"{name}=1"]} for name in ("first", "second"))
    tried = {
        "suggestion": one, "fixed": True, "why": "less is lost", "symptom": "share",
        "checkpoint": None, "without": arm, "with_it": arm | {"symptom": 0.25},
    }  # fmt: skip
    told = finding(
        suggestion=one, alternatives=[other], tried=[tried], evidence={"loss_scale": 2.0**24}
    )
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"verdict": "bad", "findings": [told]}))
    page = said(read_sources([file]))
    assert "Tried: </b>set <code>first</code>: helps. less is lost" in page
    assert "share: 0.5 without it, 0.25 with it" in page
    assert '<li>set <code>second</code><pre tabindex="0">--set second=1</pre></li>' in page
    assert "loss scale: 16,777,216" in page


def test_why_a_run_ended_is_told_once(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=2)
    problems = [
        {"file": None, "line": None, "column": None, "path": None, "message": why, "hint": "help",
         "severity": "error", "finding": None}
        for why in ("it diverged", "it broke")
    ]  # fmt: skip
    ended = result(2, status="diverged", exit_code=5, reason="it diverged; it broke",
                   problems=problems)  # fmt: skip
    (path / "result.json").write_text(json.dumps(ended))
    assert "</b>: it diverged (help); it broke (help)</p>" in said(read_sources([path]))


def test_memory_that_no_machine_has_is_unknown(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=2)
    (path / "result.json").write_text(json.dumps(result(2, peak_memory_bytes=10**400)))
    told = plan(memory=MEMORY.model_copy(update={"peak": 10**400}))
    (path / "attempts/1/plan.json").write_text(told.to_json())
    page = report_page(read_sources([path]))
    assert "<td>unknown</td><td>fp16</td>" in page


def test_attempts_that_are_not_there_do_not_count(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=2)
    (path / "attempts" / "999999999").mkdir()
    (found,) = read_sources([path]).runs
    assert [attempt.number for attempt in found.attempts] == [1]


def test_a_copy_of_the_diagnosis_beside_a_run_is_shown_once(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=2)
    for file in (tmp_path / "copy.json", path / "diagnosis.json"):
        file.write_text(json.dumps({"verdict": "bad", "findings": [finding()]}))
    assert len(read_sources([tmp_path / "copy.json", path]).diagnoses) == 1
