"""ZeRO-Offload by the command line: killed, gone on with, beside pickles that execute."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_distributed import FINAL
from tests.processes import Several

RECIPE = """\
name: small
task:
  kind: masked-lm
  model: {kind: config, name: bert-tiny, values: {hidden_size: 32, intermediate_size: 64}}
data: {kind: text, sequence_length: 16, tokenizer: {kind: wordpiece, vocab_size: 300}}
precision: {mode: fp32}
optim: {kind: adamw, lr: 1e-3}
train: {steps: 8, global_batch_size: 8, clip: {kind: norm, max_norm: 1.0}}
eval: {every: null}
engine: {kind: deepspeed, processes: 2, device: cpu, stage: 2, offload: true, timeout_seconds: 60}
output: {checkpoint_every: 3 steps, async_checkpoint: false}
"""
KILLED_ONCE = """\
        if rank == 1 and step == 5 and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), 9)
"""
NAMES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path("executed").absolute()),)


def plant(folder: Path) -> None:
    """Files as DeepSpeed's own checkpoints have them, which it would load here."""
    for inner in (folder, folder / "global_step3"):
        inner.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            (inner / name).write_bytes(pickle.dumps(Hostile()))
    (folder / "latest").write_text("global_step3")


PLANTED = ("out", "out/checkpoints")  # a checkpoint with more files than its own is refused


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)


@pytest.mark.verify
def test_a_run_of_one_process_goes_on_and_executes_no_pickle() -> None:
    settings = ("--set", "engine.processes=1", "--set", "train.steps=3", "--json")
    code, _, err = Several("small.yaml", "--output", "out", *settings, hook="").ended(120)
    assert code == 0, err
    for folder in PLANTED:
        plant(Path(folder))
    more = ("--resume", "out", "--set", "train.steps=4", "--json")
    code, out, err = Several(*more, hook="").ended(120)
    assert (code, json.loads(out)["steps_attempted"]) == (0, 4), err
    assert not Path("executed").exists()


@pytest.mark.verify
def test_a_killed_run_goes_on_and_executes_no_pickle() -> None:
    run = Several("small.yaml", "--output", "out", "--json", hook=KILLED_ONCE)
    run.in_step(1, 4)
    for folder in PLANTED:
        plant(Path(folder))
    code, out, err = run.ended(300)
    assert (code, json.loads(out)["status"]) == (0, "done"), err
    rows = [json.loads(line) for line in Path("out/steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["attempt"] for row in rows] == [1] * 3 + [2] * 5
    assert not Path("executed").exists()
    assert Path("out", FINAL).exists()
    told = json.loads(Path("out/attempts/2/deepspeed.json").read_text())
    assert told["zero_optimization"]["offload_optimizer"]["device"] == "cpu"

    code, out, err = Several(
        *("--resume", "out", "--set", "engine={kind: local, device: cpu}"),
        *("--set", "train.steps=10", "--json"),
        hook="",
    ).ended(120)
    assert (code, json.loads(out)["steps_attempted"]) == (0, 10), err
    assert not Path("executed").exists()
