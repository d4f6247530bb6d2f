"""The run directory that a recorder writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpcli.flight import flights
from mpcli.recipe.errors import Exit, UserError
from mpcli.recorder import Recorder
from mpcli.recorder.tensors import gradient_norm, named_tensors, num_samples
from mpcli.rundir import RunDirectory
from tests.host_reads import HostReads
from tests.recorder.conftest import Recording
from tests.recorder.loops import LOOPS, adam, batches, bf16, conv_net, fp32, loss_of


def test_steps_have_the_rows_of_any_run(recording: Recording) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = recording.record(model, optimizer)
    expected = []
    for batch in batches(3):
        with step(batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            expected.append((loss.item(), norm.item(), optimizer.param_groups[0]["lr"]))
            optimizer.param_groups[0]["lr"] *= 0.5
    run = recording.close()
    rows = list(run.steps())
    assert [row.step for row in rows] == [1, 2, 3]
    assert [(row.loss, row.grad_norm, row.lr) for row in rows] == [
        pytest.approx(values) for values in expected
    ]
    assert all(row.applied and row.scale == 1.0 and row.samples_per_second > 0 for row in rows)
    result = run.result()
    assert result is not None
    assert (result.status, result.steps_attempted, result.steps_applied) == ("done", 3, 3)
    assert result.metrics["train"]["loss"] == rows[-1].loss


@pytest.mark.parametrize(("every", "sampled"), [(0, set()), (1, {1, 2, 3, 4}), (3, {1, 3})])
def test_sampled_are_the_first_step_and_every_so_many(
    every: int, sampled: set[int], recording: Recording
) -> None:
    fp32(conv_net(), lambda *args: recording.record(*args, every=every))
    assert {row.step for row in recording.close().layers()} == sampled


def test_a_sampled_step_has_rows_of_every_kind_beside_their_shadows(recording: Recording) -> None:
    bf16(conv_net(), lambda *args: recording.record(*args, every=3))
    rows = [row for row in recording.close().layers() if row.step == 3]
    parameters = {name for name, _ in conv_net().named_parameters()}
    for kind in ("weight", "grad", "update"):
        assert {row.name for row in rows if row.tensor == kind} == parameters
    modules = {row.module: row for row in rows if row.tensor == "output"}
    assert list(modules) == ["0", "1", "2", "3", "4", "5"]
    assert {name for name, row in modules.items() if row.shadow} == {"0", "1", "3", "5"}
    gradients = {row.name: row for row in rows if row.tensor == "grad"}
    shadow = gradients["5.weight"].shadow
    assert shadow is not None
    assert 0 < shadow.error < 0.02
    assert all(row.update_ratio for row in rows if row.tensor == "update")


def test_scaled_gradients_carry_their_scale(recording: Recording) -> None:
    LOOPS["fp16"](conv_net(), lambda *args: recording.record(*args, every=4))
    rows = [row for row in recording.close().layers() if row.step == 4]
    steps = {row.step: row for row in recording.close().steps()}
    scales = {row.tensor: row.scale for row in rows}
    assert scales["grad_output"] == scales["grad"] == steps[4].scale > 1
    assert scales["output"] == scales["weight"] == scales["update"] == 1


def test_a_hand_made_scale_has_no_shadow_of_gradients(recording: Recording) -> None:
    LOOPS["masters"](conv_net(), lambda *args: recording.record(*args, every=1))
    rows = list(recording.close().layers())
    assert {row.shadow for row in rows if row.tensor == "grad"} == {None}
    assert any(row.shadow for row in rows if row.tensor == "output")


def test_observed_types_are_of_the_loop_s_own_operations(recording: Recording) -> None:
    bf16(conv_net(), lambda *args: recording.record(*args, every=1))
    observed = recording.close().observed()
    assert observed["0"].computed == observed["5"].computed == "bf16"
    assert observed["loss"].computed == "fp32"


def test_a_step_costs_one_read_of_the_device(recording: Recording) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step = recording.record(model, optimizer, every=0)
    first, second, third = batches(3)
    with step(first):
        loop(first)
    with HostReads() as alone:
        loop(second)
    with HostReads() as recorded, step(third):
        loop(third)
    # `tolist` of one tensor reads its elements: loss, norms and scale, in one copy from a GPU.
    numbers = 5
    assert recorded.count - alone.count <= numbers


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ValueError("no luck\nat all"), "failed", Exit.BUG),
        (KeyboardInterrupt(), "interrupted", Exit.INTERRUPTED),
    ],
)
def test_how_the_loop_ended_is_in_the_result(
    error: BaseException, status: str, code: int, recording: Recording
) -> None:
    model = conv_net()
    step = recording.record(model, adam(model))
    with pytest.raises(type(error)), step(None):
        raise error
    result = recording.close().result()
    assert result is not None
    assert (result.status, result.exit_code) == (status, code)
    if status == "failed":
        assert result.reason == "ValueError: no luck"


def test_a_loop_that_goes_on_after_an_error_is_done(recording: Recording) -> None:
    model = conv_net()
    step = recording.record(model, optimizer := adam(model))
    with pytest.raises(MemoryError), step(None):
        raise MemoryError
    with step(None):
        loss_of(model, next(batches())).backward()
        optimizer.step()
    result = recording.close().result()
    assert result is not None
    assert (result.status, result.steps_attempted, result.steps_applied) == ("done", 2, 1)


def test_a_closed_recorder_records_no_more(recording: Recording) -> None:
    model = conv_net()
    step = recording.record(model, adam(model))
    recording.close()
    with pytest.raises(UserError, match="is closed"), step(None):
        pass


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    model = conv_net()
    with pytest.raises(UserError, match="is not empty") as refused:
        Recorder(model, adam(model), out=tmp_path)
    assert refused.value.exit_code == Exit.USAGE


def test_a_negative_interval_is_refused(tmp_path: Path) -> None:
    model = conv_net()
    with pytest.raises(UserError, match="every=-1"):
        Recorder(model, adam(model), out=tmp_path, every=-1)


def test_settings_of_optimizer_and_scaler_are_recorded(recording: Recording) -> None:
    model = conv_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    recording.record(model, torch.optim.Adam(model.parameters(), eps=1e-6), scaler)
    about = recording.close().foreign()
    assert about is not None
    assert about.settings["optimizer.eps"] == 1e-6
    assert about.settings["optimizer.betas.1"] == 0.999
    assert about.settings["scaler.init_scale"] == 512.0
    assert (about.model, about.optimizer, about.scaler) == ("Sequential", "Adam", "GradScaler")


def test_an_optimizer_of_accelerate_is_unwrapped(recording: Recording) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model = conv_net()
    model, optimizer = accelerator.prepare(model, adam(model))
    step = recording.record(model, optimizer)
    for batch in batches(2):
        with step(batch):
            accelerator.backward(loss_of(model, batch))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert [event.event for event in recording.events()] == [
        *("forward", "backward", "clip_norm", "optimizer_step", "zero_grad")
    ]
    assert all(row.applied for row in recording.close().steps())


def test_the_scaler_of_an_optimizer_of_accelerate_is_found(recording: Recording) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.Accelerator(cpu=True)
    model = conv_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-14)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(adam(model), scaler=scaler)
    step = recording.record(model, optimizer)
    for batch in batches(2):
        with step(batch):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    rows = list(recording.close().steps())
    assert [(row.applied, row.scale) for row in rows] == [(False, 2.0**24), (True, 2.0**10)]
    assert [event.event for event in recording.events(2)] == [
        *("forward", "scale", "backward", "unscale", "optimizer_step", "scaler_update"),
        "zero_grad",
    ]


def test_a_scaler_that_is_switched_off_is_none(recording: Recording) -> None:
    model = conv_net()
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", enabled=False)
    step = recording.record(model, optimizer, scaler)
    with step(None):
        scaler.scale(loss_of(model, next(batches()))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert [event.event for event in recording.events()] == [
        "forward",
        "backward",
        "optimizer_step",
    ]
    about = recording.close().foreign()
    assert about is not None
    assert about.settings["scaler.enabled"] is False


def test_a_full_disk_ends_no_training(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = conv_net()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpcli.rundir.sync", full)
    fp32(model, recording.record)
    assert "records were lost: No space left on device" in recording.caplog.text
    monkeypatch.undo()


def test_samples_and_tensors_of_a_batch_are_found_in_any_nesting() -> None:
    x, y = torch.zeros(5, 2), torch.zeros(3)
    assert num_samples(x) == num_samples((x, y)) == num_samples({"n": None, "x": x}) == 5
    assert num_samples([{"x": x}, {"x": y}]) == num_samples([(x, x), (y, y)]) == 8
    assert num_samples(None) == num_samples([]) == 0
    assert set(named_tensors({"x": x, "n": [1, y]})) == {"['n'][1]", "['x']"}
    assert list(named_tensors(x)) == ["batch"]


def test_the_norm_is_right_for_mixed_types_and_sparse_gradients() -> None:
    tensors = [torch.full((4,), 6e4).half(), torch.full((9,), 1e5), torch.ones(2).double()]
    expected = sum(float(t.double().square().sum()) for t in tensors) ** 0.5
    assert gradient_norm(tensors).item() == pytest.approx(expected)
    twice = torch.sparse_coo_tensor([[0, 0]], [3.0, 4.0], (2,), check_invariants=True)
    assert gradient_norm([twice]).item() == 7.0


SCRIPT = """
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from mpcli import HFRecorder

tokens = torch.randint(5, 50, (16, 8), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row[0] % 2} for row in tokens]
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=32, max_position_embeddings=16)
model = BertForSequenceClassification(config)
dense = model.bert.encoder.layer[0].intermediate.dense
with torch.no_grad():
    dense.weight.fill_(3e38)  # its first product leaves the range of bf16
arguments = TrainingArguments("hf", max_steps=2, bf16=True, use_cpu=True, report_to=[],
                              per_device_train_batch_size=4, save_strategy="no")
trainer = Trainer(model=model, args=arguments, train_dataset=data)
recorder = HFRecorder(trainer, out="run")
trainer.train()
recorder.close()
"""


@pytest.mark.slow
def test_a_trainer_s_script_with_three_lines_more_names_module_and_step(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    module = "bert.encoder.layer.0.intermediate.dense"
    assert f"was made by `{module}`, in forward" in done.stderr
    run = RunDirectory.read(tmp_path / "run")
    first = flights(run)[0]
    assert first.step == 1
    assert first.origin is not None
    assert first.origin.module == module


@pytest.mark.slow
def test_a_script_that_dies_without_closing_leaves_a_result(tmp_path: Path) -> None:
    script = """
import torch
from mpcli import Recorder
model = torch.nn.Linear(1, 1)
recorder = Recorder(model, torch.optim.SGD(model.parameters()), out="run")
with recorder.step(None):
    raise RuntimeError("mine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.stderr.rstrip().endswith("RuntimeError: mine")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["reason"]) == ("failed", "RuntimeError: mine")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raise RuntimeError('bad sample')", "sys.exit(3)", "pass"])
def test_a_script_that_ends_between_two_steps_was_not_done(end: str, tmp_path: Path) -> None:
    script = f"""
import sys
import torch
from mpcli import Recorder
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters())
recorder = Recorder(model, optimizer, out="run")
with recorder.step(None):
    model(torch.ones(1)).backward()
    optimizer.step()
{end}
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=240, check=False)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["reason"] == "the process ended before the recorder was closed"


def test_a_training_that_goes_on_counts_on(tmp_path: Path) -> None:
    model = conv_net()
    optimizer = adam(model)
    recorder = Recorder(model, optimizer, out=tmp_path / "run", every=4, steps_before=5)
    for batch in batches(4):
        with recorder.step(batch):
            loss_of(model, batch).backward()
            optimizer.step()
    recorder.close()
    run = RunDirectory.read(tmp_path / "run")
    assert [row.step for row in run.steps()] == [6, 7, 8, 9]
    assert {row.step for row in run.layers()} == {6, 8}
    assert run.observed()
    result = run.result()
    assert result is not None
    assert (result.steps_attempted, result.steps_skipped) == (4, 0)


@pytest.mark.slow
def test_the_command_line_starts_without_torch_and_the_recorders_come_when_asked_for() -> None:
    script = """
import sys
import mpcli.cli
assert "torch" not in sys.modules
from mpcli import HFRecorder, Recorder
assert "torch" in sys.modules
assert "transformers" not in sys.modules
try:
    from mpcli import Nothing
except ImportError as error:
    assert "Nothing" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)
