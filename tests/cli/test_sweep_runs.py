"""`mptrain sweep` with real runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.slow


def results(sweep: Path, mode: str) -> dict[int, dict]:
    """By seed, the result of every run of a mode, from its own run directory."""
    found = {}
    for path in sweep.glob(f"trials/{mode}-seed*/result.json"):
        found[int(path.parent.name.rpartition("seed")[2])] = json.loads(path.read_text())
    return found


@pytest.mark.verify  # a minute; its statistics are tested beside scipy's in a moment
def test_precision_over_seeds_beside_a_direct_computation(mptrain_process, recipe, tmp_path):
    command = (
        "mptrain sweep precision tiny.yaml --modes bf16,fp32 --seeds 5 --jobs 2 --steps 4 "
        "--output sweep --json"
    )
    outcome = mptrain_process(command)
    assert outcome.code == 0, outcome.err
    bf16, fp32 = outcome.json["rows"]
    assert (bf16["mode"], fp32["mode"]) == ("bf16", "fp32")
    runs = {mode: results(tmp_path / "sweep", mode) for mode in ("fp32", "bf16")}
    scores = {
        mode: np.array([found[seed]["metrics"]["eval"]["accuracy"] for seed in range(5)])
        for mode, found in runs.items()
    }
    for mode, row in (("fp32", fp32), ("bf16", bf16)):
        assert row["mean"] == pytest.approx(scores[mode].mean())
        assert row["standard_error"] == pytest.approx(np.std(scores[mode], ddof=1) / 5**0.5)
    differences = scores["bf16"] - scores["fp32"]
    assert bf16["difference"] == pytest.approx(differences.mean())
    assert bf16["difference_standard_error"] == pytest.approx(np.std(differences, ddof=1) / 5**0.5)
    if differences.any():
        p = stats.ttest_rel(scores["bf16"], scores["fp32"]).pvalue
        assert bf16["p"] == bf16["p_holm"] == pytest.approx(p)

    again = mptrain_process(command)
    assert again.json == outcome.json  # of the runs that there are: nothing is run
    assert "seed" not in again.err


def test_loss_scale_of_real_runs(mptrain_process, recipe, tmp_path):
    outcome = mptrain_process(
        "mptrain sweep loss-scale tiny.yaml --values 2^-20,2^8,2^24 --steps 6 --jobs 2"
    )
    assert outcome.code == 0, outcome.err
    assert re.search(r"^2\^-20 +unreliable +- +- +\d", outcome.out, re.MULTILINE)
    assert re.search(r"^2\^24 .* 100\.0% ", outcome.out, re.MULTILINE)  # every step was skipped
    assert "\x1b" not in outcome.out
    (sweep,) = tmp_path.glob("runs/tiny/sweep-loss-scale-*")
    result = json.loads((sweep / "result.json").read_text())
    rows = {row["label"]: row for row in result["rows"]}
    assert rows["scale=256"]["status"] == "done"
    assert rows["scale=16777216"]["status"] == "diverged"
    assert result["recommended"]["set"] in outcome.out
    # Every trial is an ordinary run directory.
    shown = mptrain_process(f"mptrain diagnose {sweep}/trials/scale=16777216-seed0 --json")
    assert shown.json["findings"][0]["id"] == "scale-too-high"
