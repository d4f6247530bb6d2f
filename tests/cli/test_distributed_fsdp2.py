"""Processes that divide the weights among them: killed, preempted, and gone on with by others."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cli.test_distributed import FINAL, LONG, OUT, TWO, attempts, result
from tests.processes import Several

FSDP2 = TWO.replace("kind: ddp", "kind: fsdp2")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(FSDP2)


def rows():
    return [json.loads(line) for line in Path("out/steps.jsonl").read_text().splitlines()]


KILLED_ONCE_IN = """\
        if rank == 1 and step in (8, 13) and not os.path.exists(f"killed-{step}"):
            open(f"killed-{step}", "w").close()
            os.kill(os.getpid(), 9)
"""


@pytest.mark.verify
def test_a_restart_that_made_progress_is_not_counted():
    short = (
        *("--set", "train.steps=18", "--set", "output.checkpoint_every=5 steps"),
        *("--set", "output.async_checkpoint=false", "--set", "engine.max_restarts=1"),
    )
    code, _, err = Several("small.yaml", "--output", "whole", *short, hook="").ended(300)
    assert code == 0, err
    code, _, err = Several(*OUT, *short, hook=KILLED_ONCE_IN).ended(300)
    assert (code, result()["status"]) == (0, "done"), err
    assert [row["attempt"] for row in rows()] == [1] * 5 + [2] * 5 + [3] * 8
    assert Path("out", FINAL).read_bytes() == Path("whole", FINAL).read_bytes()


@pytest.mark.verify
def test_what_one_engine_began_others_go_on_with():
    run = Several(*OUT, *LONG, "--set", "output.checkpoint_every=null")
    pid = run.in_step(1, 30)
    saved = Path("out/checkpoints")
    assert not saved.exists() or not any(saved.iterdir())
    run.process.send_signal(signal.SIGUSR1)  # to the launcher
    end = time.monotonic() + 30
    while not (by_signal := list(saved.glob("step-*[0-9]"))) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    code, out, err = run.ended(60)
    assert (code, json.loads(out)["status"]) == (75, "preempted"), err
    steps = json.loads(out)["steps_attempted"]
    assert json.loads(out)["checkpoint"] == f"checkpoints/step-{steps}"
    assert by_signal

    saving = ("--set", "output.checkpoint_every=100 steps")
    two = ("--set", "engine.processes=2")  # local has forgotten how many there were
    for number, (kind, processes) in enumerate([("local", ()), ("ddp", two)], 1):
        steps_now = ("--set", f"train.steps={steps + 3 * number}")
        more = ("--set", f"engine.kind={kind}", *processes, *steps_now)
        run = Several("--resume", "out", *more, *saving, "--json", hook="")
        code, out, err = run.ended()
        assert (code, json.loads(out)["steps_attempted"]) == (0, steps + 3 * number), err
    assert [row["step"] for row in rows()] == list(range(1, steps + 7))
    assert [row["attempt"] for row in rows()] == [1] * steps + [2] * 3 + [3] * 3
    assert attempts() == ["1", "2", "3"]
    assert Path("out/attempts/3/log.rank1.txt").exists()
    assert not Path("out/attempts/2/log.rank1.txt").exists()
