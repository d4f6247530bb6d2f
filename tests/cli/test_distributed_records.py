"""What a run of two processes records, beside one process that cuts its batches alike."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.processes import MPTRAIN
from tests.small import RECIPE

pytestmark = pytest.mark.slow
OVERRIDES = (
    "precision={mode: fp16, loss_scale: {kind: dynamic, init_scale: 16777216}}",
    "train={steps: 12, global_batch_size: 16, micro_batch_size: 8}",
    "probe={every: 4, shadow_every: 4}",
    "eval.every=6 steps",
)
TWO = "device: cpu, processes: 2"


BOTH = pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.verify)])


class Runs(dict[str, Path]):
    """A run that overflows at first, of each engine that is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "small.yaml").write_text(RECIPE)

    def __missing__(self, name: str) -> Path:
        engine = "{kind: local, device: cpu}" if name == "local" else f"{{kind: {name}, {TWO}}}"
        sets = [word for override in OVERRIDES for word in ("--set", override)]
        subprocess.run(
            [MPTRAIN, "run", "small.yaml", *sets, "--set", f"engine={engine}", "--output", name],
            cwd=self.folder, check=True, capture_output=True,
        )  # fmt: skip
        self[name] = self.folder / name
        return self[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@BOTH
def test_steps_and_evaluations_are_those_of_one_process(runs: Runs, engine: str) -> None:
    one, two = (rows(runs[name], "steps.jsonl") for name in ("local", engine))
    assert [row["step"] for row in two] == list(range(1, 13))
    for name in ("applied", "scale", "lr"):
        assert [row[name] for row in two] == [row[name] for row in one]
    assert not one[0]["applied"]
    assert one[-1]["applied"]
    for name in ("loss", "grad_norm"):
        first = [float(row[name]) for row in one]
        assert [float(row[name]) for row in two] == pytest.approx(first, rel=1e-2, nan_ok=True)
    evaluations = rows(runs[engine], "evals.jsonl")
    assert [row["step"] for row in evaluations] == [6, 12]


@BOTH
def test_the_probe_sees_whole_tensors_and_the_sums_of_gradients(runs: Runs, engine: str) -> None:
    one, two = (
        {(r["step"], r["tensor"], r["name"]): r for r in rows(runs[name], "layers.jsonl")}
        for name in ("local", engine)
    )
    assert one.keys() == two.keys()
    for key, row in one.items():
        other = two[key]
        for field in ("dtype", "elements", "sampled"):
            assert (key, other[field]) == (key, row[field])
        if key[1] in ("weight", "grad"):
            assert (key, float(other["max"])) == (key, pytest.approx(float(row["max"]), rel=0.02))
        assert (other["shadow"] is None) == (row["shadow"] is None)
    gradients = [row for row in two.values() if row["tensor"] == "grad" and row["step"] == 12]
    assert gradients
    # fp16 beside the sums of both ranks' fp32 gradients: a rank's own would be far from them.
    assert all(row["shadow"]["error"] < 0.05 for row in gradients)


@BOTH
def test_skipped_steps_are_kept_once_and_types_are_as_planned(runs: Runs, engine: str) -> None:
    flights = [
        sorted(path.name for path in (runs[name] / "flights").iterdir())
        for name in ("local", engine)
    ]
    assert flights[0] == flights[1] != []
    batches = [
        (runs[name] / "flights" / flights[0][0] / "batch.safetensors").stat().st_size
        for name in ("local", engine)
    ]
    assert batches[0] == batches[1]  # the whole global batch
    observed = [
        json.loads((runs[name] / "attempts/1/observed.json").read_text())
        for name in ("local", engine)
    ]
    assert observed[0] == observed[1]
    result = json.loads((runs[engine] / "result.json").read_text())
    assert result["problems"] == []
    assert (runs[engine] / "attempts/1/log.rank1.txt").exists()
    assert not list(runs[engine].glob("attempts/1/failure*"))


@BOTH
def test_a_step_of_two_processes_is_replayed_in_one(runs: Runs, engine: str) -> None:
    done = subprocess.run(
        [MPTRAIN, "diagnose", runs[engine], "--replay", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    replay = told["evidence"]["replay"]
    assert replay["micro_batches"] == 2
    assert float(replay["loss"]) == pytest.approx(float(replay["recorded_loss"]), rel=1e-4)
