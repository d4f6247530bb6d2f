"""Saving while the training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcli import checkpoint
from mpcli.checkpoint import Checkpoint, saver
from mpcli.recipe.errors import Exit, UserError
from tests.checkpoints import tensors
from tests.small import run_small

ASYNC = ["output.async_checkpoint=true", "output.checkpoint_every=1 steps"]


class Gate:
    """Holds saves up until they may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.threads: list[threading.Thread] = []
        save = saver.save

        def gated(*arguments: Any, **options: Any) -> Checkpoint:
            self.threads.append(threading.current_thread())
            self.begun.set()
            assert self.open.wait(30)
            if self.error:
                raise self.error
            return save(*arguments, **options)

        monkeypatch.setattr(saver, "save", gated)


def test_what_is_saved_is_what_was_there_when_the_save_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, state = Gate(monkeypatch), tensors(1)
    found = saver.Saver(tmp_path / "checkpoints", 2, state, background=True)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    found.save(1, state, {"a": 1})
    assert gate.begun.wait(30)
    assert found.finished() is None  # and this did not wait
    for tensor in state.values():
        tensor.zero_()
    gate.open.set()
    saved = found.finished(wait=True)
    assert saved is not None
    loaded, _ = checkpoint.load(saved)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_any_layout_is_copied(tmp_path: Path) -> None:
    """Images' weights in channels_last, views with gaps, numbers, nothing at all."""
    state = {
        "channels_last": torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "every_other": torch.randn(10)[::2],
        "transposed": torch.randn(3, 4).t(),
        "offset": torch.randn(10)[3:],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "number": torch.tensor(3),
        "half": torch.randn(5).bfloat16(),
        "truth": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
    }
    found = saver.Saver(tmp_path / "checkpoints", 2, state, background=True)
    found.save(1, state, {})
    saved = found.finished(wait=True)
    assert saved is not None
    loaded, _ = checkpoint.load(saved)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_save_waits_for_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    found = saver.Saver(tmp_path / "checkpoints", 9, tensors(), background=True)
    for step in range(1, 6):
        found.save(step, tensors(step), {})
    found.finished(wait=True)
    for step in range(1, 6):
        loaded, _ = checkpoint.load(Checkpoint(tmp_path / f"checkpoints/step-{step}", step))
        assert torch.equal(loaded["model.weight"], tensors(step)["model.weight"])
    assert threading.main_thread() not in gate.threads


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    found = saver.Saver(tmp_path / "checkpoints", 2, tensors(), background=background)
    found.save(1, tensors(1), {})
    before = found.finished(wait=True)
    gate.error = UserError()
    with pytest.raises(UserError):
        found.save(2, tensors(2), {})
        found.finished(wait=True)
    gate.error = None
    assert found.finished(wait=True) == before
    assert before is not None
    checkpoint.verify(before)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 1 ends only when the second step is over: a run that waited would hang."""
    whole, _ = run_small(tmp_path, name="whole")
    gate = Gate(monkeypatch)
    from mpcli.engines.local import LocalEngine

    step, steps = LocalEngine.step, []

    def watched(self: LocalEngine) -> Any:
        outcome = step(self)
        steps.append(1)
        if len(steps) == 2:
            gate.open.set()
        return outcome

    monkeypatch.setattr(LocalEngine, "step", watched)
    run, result = run_small(tmp_path, *ASYNC)
    assert (result.status, result.checkpoint) == ("done", "final")
    assert {path.name for path in run.checkpoints_path.iterdir()} == {"step-3", "step-4"}
    model = "final/model.safetensors"
    assert (run.path / model).read_bytes() == (whole.path / model).read_bytes()


@pytest.mark.parametrize("failing", [2, 4])
def test_a_disk_that_fills_up_ends_the_run_with_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write = checkpoint.writer._write_tensors

    def full(path: Path, *arguments: Any) -> None:
        if path.parent.name == f"step-{failing}.tmp":
            path.write_bytes(b"some of it")
            raise OSError(28, "No space left on device")
        write(path, *arguments)

    monkeypatch.setattr(checkpoint.writer, "_write_tensors", full)
    run, result = run_small(tmp_path, *ASYNC)
    assert (result.status, result.exit_code) == ("failed", Exit.STORAGE)
    assert result.checkpoint == f"checkpoints/step-{failing - 1}"
    assert "No space left" in result.problems[0]["message"]
    checkpoint.verify(Checkpoint(run.path / result.checkpoint, failing - 1))
    assert not list(run.checkpoints_path.glob("*.tmp"))
