"""The same behaviour on a CUDA device; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpcli.launch import launch
from mpcli.machine import detect_machine
from mpcli.plan import make_plan
from mpcli.precision.statistics import Key, Samples
from mpcli.rundir import RunDirectory
from tests import small
from tests.engines.test_local import MODES as CPU_MODES
from tests.engines.test_local import (
    OPTIMIZERS,
    make_batch,
    make_engine,
    make_loss,
    state_hash,
)
from tests.small import Silent, small_recipe
from tests.stopped import assert_same_run, kill_at, killed_run
from tests.test_trainer import rows

MODES = {**CPU_MODES, "tf32": "{mode: tf32}"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_records_every_step(tmp_path: Path, mode: str) -> None:
    loaded = small_recipe(
        tmp_path, "engine.device=cuda", f"precision={MODES[mode]}", "train.steps=50"
    )
    plan = make_plan(loaded.recipe, detect_machine())
    run = RunDirectory.create(loaded, plan, {}, tmp_path / "run")
    result = launch(run, Silent())
    assert (result.status, plan.device) == ("done", "cuda")
    assert [row["step"] for row in rows(run)] == list(range(1, 51))
    assert all(0 < row["memory_allocated_bytes"] <= row["memory_peak_bytes"] for row in rows(run))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_never_wait_for_the_device(tmp_path: Path, mode: str, optimizer: str) -> None:
    device = torch.device("cuda")
    engine = make_engine(
        tmp_path,
        f"optim={OPTIMIZERS[optimizer]}",
        f"precision={MODES[mode]}",
        "train.ema=0.9",
        "train.clip={kind: norm, max_norm: 1.0}",
        device=device,
    )
    batch = type(make_batch())(*(tensor.to(device) for tensor in make_batch()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(20):
            engine.accumulate(make_loss(float("inf") if step == 5 else 1.0), batch, 8, last=True)
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.applied.item() == 19


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_first_step_changes_nothing(tmp_path: Path, optimizer: str, mode: str) -> None:
    device = torch.device("cuda")
    settings = (f"optim={OPTIMIZERS[optimizer]}", f"precision={MODES[mode]}")
    engine = make_engine(tmp_path, *settings, device=device)
    batch = type(make_batch())(*(tensor.to(device) for tensor in make_batch()))
    before = state_hash(engine)
    engine.accumulate(make_loss(float("inf")), batch, 8, last=True)
    assert engine.step().found_inf == 1
    assert state_hash(engine) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, background: str
) -> None:
    monkeypatch.setattr(small, "CPU", detect_machine())
    overrides = [
        *("engine.device=cuda", "train.deterministic=true", "train.steps=7"),
        f"precision={MODES[mode]}",
        f"output={{checkpoint_every: 2 steps, async_checkpoint: {background}}}",
    ]
    whole, _ = small.run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        run = killed_run(tmp_path, *overrides)
    assert small.resume_small(run).status == "done"
    assert_same_run(run, whole)


def test_a_table_of_tensors_is_that_of_a_cpu_and_nobody_waits_for_it() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in ((10,), (70, 300), (8, 16, 32, 32))]
    tensors[1][3, 4] = float("inf")
    tables = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        on_device = [tensor.to(device) for tensor in tensors]
        samples = Samples(device)
        for again in (False, True):  # as in every later step
            samples.begin(torch.full((), 4.0, device=device))
            torch.cuda.set_sync_debug_mode("error" if again else "default")
            try:
                for number, tensor in enumerate(on_device):
                    samples.add(tensor, Key("", "grad", str(number)), scaled=True)
                    samples.add_update(Key("", "update", str(number)), tensor, tensor + 1, tensor)
                pending = samples.finish(torch.zeros((), device=device))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        tables.append(pending.records(1, 1))
    host, gpu = tables
    assert host is not None
    assert gpu is not None
    for own, other in zip(host, gpu, strict=True):
        assert own.rms == pytest.approx(other.rms, rel=1e-6)
        assert own.model_copy(update={"rms": 0}) == other.model_copy(update={"rms": 0})
