"""Few points, and all that matters among them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcli.report.layers import read_layers
from mpcli.report.page import report_page
from mpcli.report.sources import read_sources
from mpcli.report.steps import read_steps
from mpcli.report.thin import kept
from mpcli.rundir import RunDirectory
from tests.report.synthetic import made_up_run, step_row


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=200),
    st.sets(st.integers(0, 199)),
    st.integers(1, 40),
)
def test_extremes_of_every_bucket_and_what_always_stays(
    values: list[float], stay: set[int], buckets: int
) -> None:
    curve = np.array(values)
    always = np.array([index in stay for index in range(len(values))])
    found = kept([curve], always, buckets)
    assert list(found) == sorted(set(found))
    assert {0, len(values) - 1} | set(np.flatnonzero(always)) <= set(found)
    assert len(found) <= 2 * buckets + always.sum() + 2
    width = -(-len(values) // buckets)
    for start in range(0, len(values), width):
        bucket = curve[start : start + width]
        shown = curve[[index for index in found if start <= index < start + width]]
        finite = bucket[np.isfinite(bucket)]
        if len(finite):
            assert {finite.min(), finite.max()} <= set(shown)


def test_every_skip_of_a_long_run_is_shown_and_the_page_says_so(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=10_000, sampled=1, layers=1)
    with (path / "steps.jsonl").open("a") as file:
        file.write(step_row(5006, lr=9.0, memory_allocated_bytes=1) + "\n")
    (run,) = read_sources([path]).runs
    thin = run.steps.thinned(400)
    assert len(thin) < 5000
    assert list(thin["step"][thin["applied"] == 0]) == list(range(97, 10_001, 97))
    assert np.nanmax(thin["loss"]) == np.nanmax(run.steps["loss"])
    assert (max(thin["lr"]), min(thin["memory_allocated_bytes"])) == (9, 1)
    assert f"{len(thin):,} of 10,000 steps" in report_page(read_sources([path]))


@pytest.mark.slow
def test_a_page_of_10000_steps_and_100_samples_of_60_layers_is_below_5_mb(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=10_000, sampled=100, layers=60)
    assert len(report_page(read_sources([path])).encode()) <= 5_000_000
    # What it takes to make it is below 500 MB, in a process of its own.
    code = "import sys; from mpcli.cli.app import main; main(sys.argv[1:])\n"
    code += "print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code, "report", str(path), "-o", str(tmp_path / "page.html")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", told)
    assert (tmp_path / "page.html").exists()
    assert int(peak) * 1024 <= 500_000_000


def test_samples_shown_together_keep_the_most_of_each(tmp_path: Path) -> None:
    run = RunDirectory.read(made_up_run(tmp_path / "run", steps=40, sampled=40, layers=1))
    layers = read_layers(run, Counter())
    whole, thin = layers.packed(1_000_000), layers.packed(layers.num_rows // 4)
    for every, few in zip(whole, thin, strict=True):
        assert len(few["steps"]) == 10
        zeros = [[*map(float, one["quantities"]["zeros"].split(","))] for one in (every, few)]
        assert max(zeros[0]) == max(zeros[1])
        assert min(every["lowest"]) == min(few["lowest"])


def test_a_largest_value_that_is_infinite_stays(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=4, sampled=4, layers=1)
    rows = [json.loads(row) for row in (path / "layers.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"max": math.inf}) + "\n" for row in rows)
    (path / "layers.jsonl").write_text(text)
    layers = read_layers(RunDirectory.read(path), Counter())
    for most_rows, shown in ((1000, 4), (layers.num_rows // 4, 1)):
        ranges = {tensor["quantities"]["range"] for tensor in layers.packed(most_rows)}
        assert ranges == {",".join(["inf"] * shown)}


def test_a_step_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=3)
    with (path / "steps.jsonl").open("a") as file:
        file.write(step_row(2, loss=9.0) + "\n")
    steps = read_steps(RunDirectory.read(path), Counter())
    assert list(steps["step"]) == [1, 2, 3]
    assert steps["loss"][1] == 9


def test_of_a_tensor_without_a_number_only_that_is_shown(tmp_path: Path) -> None:
    path = made_up_run(tmp_path / "run", steps=1, sampled=1, layers=1)
    row = json.loads((path / "layers.jsonl").read_text().splitlines()[0])
    about = {"elements": 4, "zeros": 0, "max": 0, "lowest_exponent": None, "exponents": []}
    counts = [(4, 0), (3, 1), (3, 0)]
    rows = [row | about | {"name": str(n), "nan": nan, "inf": inf, "max": math.inf if inf else 0}
            for n, (nan, inf) in enumerate(counts)]  # fmt: skip
    (path / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = read_layers(RunDirectory.read(path), Counter()).packed(10)
    whole, infinite, partly = (tensor["quantities"] for tensor in packed)
    assert whole == {"nonfinite": "1"}
    assert infinite == {"nonfinite": "1", "overflow": "0", "range": "inf"}
    assert (partly["nonfinite"], partly["zeros"], partly["range"]) == ("0.75", "0", "0")
