"""Signals end a run, or save it, where its state is whole."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from mpcli import checkpoint
from mpcli.checkpoint import Checkpoint, saver
from mpcli.data.image_dataset import ImageDataset
from mpcli.tasks import image_classification as task
from tests.small import resume_small, run_small
from tests.stopped import (
    EVERY_OTHER,
    LENGTH,
    MEASURED,
    MODES,
    assert_same_run,
    at_calls,
    kill_at,
    killed_run,
    rows,
    signal_at,
)


@pytest.mark.parametrize(
    "mode", ["fp16", *(pytest.param(m, marks=pytest.mark.verify) for m in ("bf16-pure", "async"))]
)
@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(signal.SIGTERM, "preempted", 75), (signal.SIGINT, "interrupted", 130)],
)
def test_stopped_by_a_signal_at_any_step_it_ends_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    number: int,
    status: str,
    code: int,
) -> None:
    overrides = [*LENGTH, *MODES[mode], "output.checkpoint_every=null"]
    whole, complete = run_small(tmp_path, *overrides, name="whole")
    for step in range(1, 8):
        with monkeypatch.context() as patch:
            signal_at(patch, number, step)
            run, result = run_small(tmp_path, *overrides, name=f"{step}")
        assert (result.status, result.exit_code) == (status, code)
        assert result.steps_attempted == step  # the step was finished, and none begun
        assert result.checkpoint == f"checkpoints/step-{step}"
        assert len(rows(run)) == step
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        resumed = resume_small(run)
        assert resumed.metrics == complete.metrics
        assert rows(run) == rows(whole)
        assert rows(run, "evals.jsonl") == rows(whole, "evals.jsonl")
        model = "final/model.safetensors"
        assert (run.path / model).read_bytes() == (whole.path / model).read_bytes()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_evaluation_that_a_signal_stops_is_made_by_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    overrides = ["train.ema=0.5", "eval.every=2 steps", "train.micro_batch_size=10"]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    evaluate, calls = task.evaluate, itertools.count()

    def interrupted(options: Any, model: Any, batches: Any) -> dict[str, float]:
        number = next(calls)

        def watched() -> Any:
            for index, batch in enumerate(batches):
                if number == 0 and index == at:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        return evaluate(options, model, watched())

    monkeypatch.setattr(task, "evaluate", interrupted)
    run, result = run_small(tmp_path, *overrides)
    assert (result.status, result.steps_attempted) == ("preempted", 2)
    assert not (run.path / "evals.jsonl").exists()
    assert resume_small(run).status == "done"
    assert_same_run(run, whole)


def test_a_signal_while_a_checkpoint_is_saved_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def interrupted(folder: Path, step: int, *arguments: Any, **options: Any) -> Checkpoint:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return save(folder, step, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(saver, "save", interrupted)
        run, result = run_small(tmp_path, EVERY_OTHER)
    assert (result.exit_code, result.checkpoint) == (75, "checkpoints/step-2")
    assert len(rows(run)) == 2
    assert resume_small(run).status == "done"


def test_a_second_ctrl_c_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    whole, _ = run_small(tmp_path, EVERY_OTHER, name="whole")
    with monkeypatch.context() as patch:
        at_calls(patch, (4,), act)
        run, result = run_small(tmp_path, EVERY_OTHER)
    assert (result.status, result.exit_code) == ("interrupted", 130)
    assert result.checkpoint == "checkpoints/step-2"  # none was made of a step that was torn
    assert len(rows(run)) == 3
    assert resume_small(run).status == "done"
    assert_same_run(run, whole)


def test_sigusr1_saves_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = "output={checkpoint_every: null, keep_last: 9}"
    whole, _ = run_small(tmp_path, "output.checkpoint_every=null", name="whole")
    signal_at(monkeypatch, signal.SIGUSR1, 2)
    run, result = run_small(tmp_path, every)
    assert (result.status, result.steps_attempted) == ("done", 4)
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-2"]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    model = "final/model.safetensors"
    assert (run.path / model).read_bytes() == (whole.path / model).read_bytes()


def test_sigusr1_during_an_evaluation_saves_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = task.evaluate

    def signalled(*arguments: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGUSR1)
        return evaluate(*arguments)

    monkeypatch.setattr(task, "evaluate", signalled)
    run, _ = run_small(tmp_path, "eval.every=3 steps", "output.checkpoint_every=null")
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-3"]


def test_many_sigterms_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    at_calls(monkeypatch, (2,), act)
    _, result = run_small(tmp_path)
    assert (result.status, result.steps_attempted) == ("preempted", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 3])
def test_a_signal_is_obeyed_while_a_data_worker_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    overrides = [*LENGTH, "engine.data_workers=1", EVERY_OTHER]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    train_batch = ImageDataset.train_batch

    def stuck(self: ImageDataset, seed: int, asked: int, batch_size: int) -> Any:
        if asked == step:
            os.kill(os.getppid(), number)
            os.kill(os.getpid(), signal.SIGSTOP)
        return train_batch(self, seed, asked, batch_size)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "train_batch", stuck)
        run, result = run_small(tmp_path, *overrides)
    assert result.exit_code == (75 if number == signal.SIGTERM else 130)
    assert result.steps_attempted <= step  # it may come while the step before is computed
    assert result.checkpoint == f"checkpoints/step-{result.steps_attempted}"
    assert resume_small(run).status == "done"
    assert_same_run(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_data_are_loaded_ends_the_attempt_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def prepare(*arguments: Any) -> None:
        signal.raise_signal(number)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(ImageDataset, "prepare", prepare)
        run, result = run_small(tmp_path)
        assert result.exit_code == (75 if number == signal.SIGTERM else 130)
        assert (result.steps_attempted, result.checkpoint) == (0, None)
    assert resume_small(run).status == "done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_library_makes_an_error_of_is_still_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        run = killed_run(tmp_path, EVERY_OTHER)

    def load(found: Checkpoint, *, hashes: bool) -> Any:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", load)
        result = resume_small(run)
    assert result.exit_code == (75 if number == signal.SIGTERM else 130)
    assert result.checkpoint == "checkpoints/step-2"
    assert resume_small(run).status == "done"


def test_a_second_ctrl_c_does_not_wait_for_a_save_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, go_on, threads = saver.save, threading.Event(), []

    def slow(*arguments: Any, **options: Any) -> Checkpoint:
        threads.append(threading.current_thread())
        assert go_on.wait(60)
        return save(*arguments, **options)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(saver, "save", slow)
    at_calls(monkeypatch, (3,), twice)
    _, result = run_small(tmp_path, "output={async_checkpoint: true, checkpoint_every: 2 steps}")
    assert result.exit_code == 130
    assert threads[0].is_alive()
    go_on.set()
    threads[0].join()


@pytest.mark.parametrize("step", [3, 6, 7])
def test_a_checkpoint_knows_what_fell_due_after_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The signal's checkpoint lacks the evaluation that the next attempt makes."""
    overrides = [
        *("train.steps=7", "eval.every=3 steps"),
        "output={checkpoint_every: 3 steps, keep_last: 9, keep_best: loss}",
    ]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, step)
        run, _ = run_small(tmp_path, *overrides)
    resume_small(run)
    assert_same_run(run, whole)
    for path in run.checkpoints_path.iterdir():
        number = int(path.name[5:])
        states = [
            checkpoint.load(Checkpoint(r.checkpoints_path / path.name, number))[1]
            for r in (run, whole)
        ]
        for state in states:
            for key in MEASURED:
                state.pop(key, None)
        assert states[0] == states[1], path.name
