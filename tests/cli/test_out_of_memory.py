"""Real processes that run out of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_distributed import TORCHRUN, attempts, result
from tests.processes import Several
from tests.test_out_of_memory import PLUGIN, SHORT

OUT = ("short.yaml", "--output", "out", "--plugin", str(PLUGIN), "--json")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe(most, engine):
    text = SHORT % most
    Path("short.yaml").write_text(text.replace("{kind: local, device: cpu}", engine))


def planned(attempt):
    plan = json.loads(Path(f"out/attempts/{attempt}/plan.json").read_text())
    return plan["micro_batch_size"], plan["accumulation"]


def losses():
    steps = [json.loads(row) for row in Path("out/steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 9))
    return [row["loss"] for row in steps]


@pytest.mark.slow
def test_a_run_goes_on_with_half_the_micro_batch_in_one_line():
    recipe(7, "{kind: local, device: cpu}")
    code, out, err = Several(*OUT, "--set", "task.begins=6", hook="").ended()
    assert (code, json.loads(out)["status"]) == (0, "done"), err
    assert [planned(number) for number in attempts()] == [(16, 1), (8, 2), (4, 4)]
    (line, _) = [line for line in err.splitlines() if "out of memory" in line]
    assert line.endswith("micro-batches of 8 instead of 16 (attempt 2)")
    assert "Traceback" not in err


@pytest.mark.verify
def test_memory_for_not_even_one_sample_ends_with_what_would_help():
    recipe(0, "{kind: local, device: cpu}")
    code, out, err = Several(*OUT, "--set", "train.micro_batch_size=2", hook="").ended()
    assert (code, json.loads(out)) == (3, result()), err
    assert [planned(number) for number in attempts()] == [(2, 8), (1, 16)]
    assert "warning: planned: weights " in err
    assert (result()["status"], result()["exit_code"]) == ("failed", 3)
    assert "Traceback" not in err
    said = subprocess.run(
        [sys.executable, "-m", "mpcli", "diagnose", "out", "--plugin", PLUGIN, "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(said.stdout)["findings"][0]["id"] == "out-of-memory", said.stderr


@pytest.mark.parametrize(
    "kind", [pytest.param("ddp", marks=pytest.mark.slow),
             pytest.param("fsdp2", marks=pytest.mark.verify)],
)  # fmt: skip
def test_what_one_of_two_processes_lacks_memory_for_all_make_smaller(kind):
    two = f"{{kind: {kind}, processes: 2, device: cpu, max_restarts: 0, timeout_seconds: 20}}"
    recipe(1000, two)
    code, _, err = Several(*OUT, hook="").ended()
    assert code == 0, err
    whole = losses()
    Path("out").rename("whole")
    short = ("--set", "task.rank=1", "--set", "task.most=4", "--set", "task.begins=6")
    code, out, err = Several(*OUT, *short, hook="").ended()
    assert (code, json.loads(out)["status"]) == (0, "done"), err
    assert [planned(number) for number in attempts()] == [(8, 1), (4, 2)]
    assert losses() == pytest.approx(whole, abs=1e-6)
    (why,) = json.loads(Path("out/attempts/2/resumed.json").read_text())["changes"]
    assert why.startswith("rank 1 in step 6: out of memory: ")
    assert f"{why} (attempt 2)" in err


@pytest.mark.verify
@pytest.mark.parametrize("restarts", [0, 1])
def test_torchruns_processes_are_made_smaller_where_it_starts_them_again(restarts):
    recipe(4, "{kind: ddp, device: cpu, timeout_seconds: 20}")
    command = (*TORCHRUN, "--max-restarts", str(restarts), "-m", "mpcli")
    run = Several(*OUT, "--set", "task.rank=1", "--set", "task.begins=6", command=command, hook="")
    code, out, err = run.ended()
    if restarts:
        assert (code, json.loads(out)["status"]) == (0, "done"), err
        assert [planned(number) for number in attempts()] == [(8, 1), (4, 2)]
    else:
        assert (code != 0, result()["exit_code"]) == (True, 3), err
        (problem,) = result()["problems"]
        assert "`micro_batch_size: 4`" in problem["hint"]
