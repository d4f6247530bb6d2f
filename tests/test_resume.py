"""A run that was stopped ends as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcli import checkpoint
from mpcli.checkpoint import Checkpoint, saver
from mpcli.data import DatasetInfo
from mpcli.engines.local import LocalEngine
from mpcli.plan import make_plan
from mpcli.recipe.changes import allowed_changes
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.load import load_recipe
from mpcli.rundir import RunDirectory
from mpcli.tasks import image_classification as task
from tests.small import CPU, resume_small, run_small, small_recipe

EVERY_OTHER = "output.checkpoint_every=2 steps"
MEASURED = {  # what no two runs have in common
    *("attempt", "samples_per_second", "seconds"),
    *("memory_allocated_bytes", "memory_peak_bytes", "peak_memory_bytes"),
}


class Killed(BaseException):
    """Nothing of the program sees this coming, as with SIGKILL."""


def kill_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The process dies in the middle of these steps (by number of calls, over all attempts)."""
    _at_calls(monkeypatch, steps, _die)


def signal_at(monkeypatch: pytest.MonkeyPatch, number: int, *steps: int) -> None:
    """A signal arrives in the middle of these steps."""
    _at_calls(monkeypatch, steps, lambda: signal.raise_signal(number))


def _at_calls(
    monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], act: Callable[[], None]
) -> None:
    step, calls = LocalEngine.step, itertools.count(1)

    def watched(self: LocalEngine) -> Any:
        if next(calls) in steps:
            act()
        return step(self)

    monkeypatch.setattr(LocalEngine, "step", watched)


def _die() -> None:
    raise Killed


def rows(run: RunDirectory, name: str = "steps.jsonl") -> list[dict[str, Any]]:
    """Rows without what differs between any two runs."""
    lines = (run.path / name).read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in MEASURED}
        for line in lines
    ]


def last_state(run: RunDirectory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything in the newest checkpoint."""
    newest, problems = checkpoint.newest_valid(run.checkpoints_path)
    assert newest is not None
    assert not problems
    tensors, state = checkpoint.load(newest)
    return tensors, {key: value for key, value in state.items() if key not in MEASURED}


def assert_same_run(run: RunDirectory, other: RunDirectory) -> None:
    """Records, weights, optimizer, scaler, random states: equal to the last bit."""
    for name in ("steps.jsonl", "evals.jsonl"):
        assert rows(run, name) == rows(other, name)
    (tensors, state), (expected, expected_state) = last_state(run), last_state(other)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8)
        ), name
    final, expected_final = (
        (r.final_path / "model.safetensors").read_bytes() for r in (run, other)
    )
    assert final == expected_final


def killed_run(folder: Path, *overrides: str, name: str = "run") -> RunDirectory:
    """A run whose process dies; its lock dies with it."""
    with pytest.raises(Killed):
        run_small(folder, *overrides, name=name)
    return RunDirectory(folder / name)


MODES = {
    "fp32": [],
    "adamw": ["optim={kind: adamw, lr: 0.01, schedule: {kind: cosine, warmup: 0.2}}"],
    "ema": ["train.ema=0.9", "optim.momentum=0"],
    "fp16": ["precision.mode=fp16"],
    "fp16-hysteresis": [
        "precision={mode: fp16, loss_scale: "
        "{kind: dynamic, init_scale: 262144, hysteresis: 2, growth_interval: 3}}"
    ],
    "scheduled": [
        "precision={mode: fp16, loss_scale: "
        "{kind: scheduled, points: [[0, 1024], [3, 256], [5, 512]]}}"
    ],
    "fp16-master": ["precision.mode=fp16-master", "optim={kind: adam, lr: 0.01}"],
    "bf16-pure": [
        "precision={mode: bf16-pure, stochastic_rounding: true, sensitive_layers: [norm]}",
        "optim={kind: adamw, lr: 0.01}",
    ],
    "accumulation": ["precision.mode=fp16", "train.micro_batch_size=7"],
    "async": ["precision.mode=fp16", "output.async_checkpoint=true"],
    "rollback": [
        "precision={mode: fp16, loss_scale: {kind: static, scale: 1024}}",
        "train.on_nonfinite=rollback",
    ],
}
LENGTH = ["train.steps=7", "eval.every=3 steps"]


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_any_step_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    overrides = [*LENGTH, EVERY_OTHER, *MODES[mode]]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    for step in range(1, 8):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            run = killed_run(tmp_path, *overrides, name=f"{step}")
        result = resume_small(run)
        assert (result.status, result.steps_attempted) == ("done", 7)
        assert_same_run(run, whole)


@pytest.mark.parametrize("mode", ["fp16", "bf16-pure", "async"])
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


def test_three_resumes_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "train={epochs: 2, global_batch_size: 150, micro_batch_size: 64, ema: 0.9}",
        "precision.mode=fp16",
        "optim.schedule={kind: one-cycle}",
        "eval.every=1 epoch",
        "output.checkpoint_every=1 epoch",
    ]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 2, 5, 7)
        run, result = run_small(tmp_path, *overrides)
        for attempt in (2, 3):
            assert result.exit_code == Exit.PREEMPTED
            result = resume_small(run)
            assert (run.path / "attempts" / str(attempt) / "observed.json").exists()
    assert result.steps_attempted == 7
    assert resume_small(run).status == "done"
    assert_same_run(run, whole)
    lines = (run.path / "steps.jsonl").read_text().splitlines()
    attempts = [json.loads(line)["attempt"] for line in lines]
    assert attempts == [1] * 2 + [2] * 3 + [3] * 2 + [4] * 11


def test_random_numbers_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_model(options: object, info: DatasetInfo) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(), nn.Linear(16, 10))

    monkeypatch.setattr(task, "build_model", build_model)
    whole, _ = run_small(tmp_path, EVERY_OTHER, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        run = killed_run(tmp_path, EVERY_OTHER)
    resume_small(run)
    assert_same_run(run, whole)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run_small(tmp_path, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        run = killed_run(tmp_path)
    assert len(rows(run)) == 2
    result = resume_small(run)
    assert_same_run(run, whole)
    assert result.steps_attempted == 4


def test_skips_in_a_row_are_counted_across_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "precision={mode: fp16, loss_scale: {kind: static, scale: 1e30}}",
        "train={steps: 20, global_batch_size: 16, max_consecutive_skips: 5}",
    ]
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 3)
        run, _ = run_small(tmp_path, *overrides)
    result = resume_small(run)
    assert (result.status, result.exit_code) == ("diverged", 5)
    assert "step 5: 5 steps in a row" in (result.reason or "")
    assert result.steps_applied == 0


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
        _at_calls(patch, (4,), act)
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


@pytest.mark.parametrize(
    ("metric", "values", "best", "kept"),
    [
        ("loss", [4, 2, 3, 5, 6], 2, {2, 4, 5}),
        ("loss", [4, 3, 2, 1, 0], 5, {4, 5}),
        ("loss", [4, 3, 3, 5, 6], 2, {2, 4, 5}),
        ("loss", [math.nan, -math.inf, 3, 5, 6], 3, {3, 4, 5}),
        ("accuracy", [0.1, 0.5, 0.3, 0.4, 0.5], 2, {2, 4, 5}),  # the first of equals
    ],
)
def test_the_best_checkpoint_is_kept_besides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    values: list[float],
    best: int,
    kept: set[int],
) -> None:
    found = iter(values)
    monkeypatch.setattr(
        task, "evaluate", lambda *_: {"loss": 9.0, "accuracy": 0.0} | {metric: next(found)}
    )
    overrides = [
        *("train.steps=5", "eval.every=1 steps"),
        f"output={{checkpoint_every: 1 steps, keep_last: 2, keep_best: {metric}}}",
    ]
    run, result = run_small(tmp_path, *overrides)
    assert {path.name for path in run.checkpoints_path.iterdir()} == {f"step-{n}" for n in kept}
    assert result.best_checkpoint == f"checkpoints/step-{best}"


def test_the_best_is_saved_when_it_is_found_and_survives_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(task, "evaluate", lambda *_: {"loss": next(found), "accuracy": 0.0})
    overrides = [
        *("train.steps=6", "eval.every=1 steps"),
        "output={checkpoint_every: 3 steps, keep_last: 1, keep_best: loss}",
    ]
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        run = killed_run(tmp_path, *overrides)
    assert {path.name for path in run.checkpoints_path.iterdir()} == {"step-2", "step-3"}
    found = iter([2.0, 2.0, 2.0])
    result = resume_small(run)
    assert {path.name for path in run.checkpoints_path.iterdir()} == {"step-2", "step-6"}
    assert result.best_checkpoint == "checkpoints/step-2"


def test_many_sigterms_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    _at_calls(monkeypatch, (2,), act)
    _, result = run_small(tmp_path)
    assert (result.status, result.steps_attempted) == ("preempted", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_data_are_loaded_ends_the_attempt_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def load_data(*arguments: Any) -> None:
        signal.raise_signal(number)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(task, "load_data", load_data)
        run, result = run_small(tmp_path)
        assert result.exit_code == (75 if number == signal.SIGTERM else 130)
        assert (result.steps_attempted, result.checkpoint) == (0, None)
    assert resume_small(run).status == "done"


def test_rows_past_the_checkpoint_and_a_torn_line_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["train.steps=6", "eval.every=1 steps", "output.checkpoint_every=3 steps"]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        run = killed_run(tmp_path, *overrides)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]
    for name in ("steps.jsonl", "evals.jsonl"):
        with (run.path / name).open("a") as file:
            file.write('{"step": 6, "att')
    resume_small(run)
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 2', b"\0" * 5000, b"[" * 70000 + b"\n", b'{"step": 1}\n', b'{"step": "2"}\n'],
)
def test_what_is_no_row_is_cut_with_all_that_follows(tmp_path: Path, tail: bytes) -> None:
    run = RunDirectory(tmp_path)
    whole = b'{"step": 1, "loss": 3.5}\n'
    (tmp_path / "steps.jsonl").write_bytes(whole + tail + whole)
    assert run.cut(5, 5) == 1
    assert (tmp_path / "steps.jsonl").read_bytes() == whole
    assert not (tmp_path / "evals.jsonl").exists()


def test_lost_rows_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 3)
    run, _ = run_small(tmp_path)
    path = run.path / "steps.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    result = resume_small(run)
    assert [row["step"] for row in rows(run)] == [1, 4]
    assert [p["message"] for p in result.problems] == [
        "steps.jsonl has no rows of the steps 2 to 3"
    ]


def test_more_steps_recompute_the_schedule_and_say_so(tmp_path: Path) -> None:
    schedule = "optim.schedule={kind: linear}"
    run, _ = run_small(tmp_path, schedule)
    result = resume_small(run, "train.steps=8")
    assert (result.status, result.steps_attempted) == ("done", 8)
    assert [row["lr"] for row in rows(run)] == pytest.approx(
        [0.1, 0.075, 0.05, 0.025, 0.05, 0.0375, 0.025, 0.0125]
    )
    (problem,) = result.problems
    assert "8 steps instead of 4" in problem["message"]
    assert (problem["severity"], problem["path"]) == ("warning", "train.steps")
    assert result.checkpoint == "final"
    about = json.loads((run.path / "attempts/2/resumed.json").read_text())
    assert about == {"changes": ["train.steps: `4` -> `8`"]}
    # the next resume knows the new length, and the run's own recipe is as it was
    assert load_recipe(RunDirectory(run.path, attempt=2).recipe_path).recipe.train.steps == 8
    assert load_recipe(run.path / "recipe.yaml").recipe.train.steps == 4


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_already_has_its_steps_is_brought_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 3)
        run, _ = run_small(tmp_path)
    result = resume_small(run, f"train.steps={steps}")
    assert (result.status, result.steps_attempted) == ("done", 3)
    assert [row["step"] for row in rows(run, "evals.jsonl")] == [3]
    assert run.final_path.exists()


def test_killed_between_the_last_step_and_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = run_small(tmp_path, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_result", lambda *arguments: _die())
        run = killed_run(tmp_path)
    assert run.final_path.exists()
    assert run.result() is None
    assert resume_small(run).metrics == expected.metrics
    assert_same_run(run, whole)
    assert len(rows(run, "evals.jsonl")) == 1


@pytest.mark.parametrize(
    "override",
    ["train.epochs=2", "train.steps=9", "train.micro_batch_size=4", "eval.every=2 steps",
     "output.checkpoint_every=10 minutes", "engine.activation_checkpointing=true"],
)  # fmt: skip
def test_what_a_resume_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2)
    run, _ = run_small(tmp_path)
    assert resume_small(run, override).status == "done"


@pytest.mark.parametrize(
    ("override", "path", "what"),
    [
        ("optim.lr=0.2", "optim.lr", "the run has `0.1`, found `0.2`"),
        ("precision.mode=bf16", "precision.mode", "the run has `fp32`, found `bf16`"),
        ("train.seed=1", "train.seed", "the run has `0`, found `1`"),
        ("output.keep_last=3", "output.keep_last", "the run has `2`, found `3`"),
        (
            "train.clip={kind: norm, max_norm: 1}",
            "train.clip",
            "the run has `null`, found a section",
        ),
    ],
)
def test_what_makes_it_another_run_is_refused_with_the_difference(
    tmp_path: Path, override: str, path: str, what: str
) -> None:
    before = small_recipe(tmp_path).recipe
    with pytest.raises(UserError) as caught:
        allowed_changes(before, small_recipe(tmp_path, override, "train.steps=9"))
    (problem,) = caught.value.problems
    assert caught.value.exit_code == Exit.USAGE
    assert (problem.path, problem.what) == (path, what)
    assert problem.place is not None


def test_a_checkpoint_that_is_damaged_is_passed_over_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["train.steps=7", EVERY_OTHER]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        run = killed_run(tmp_path, *overrides)
    (run.checkpoints_path / "step-4" / "state.json").write_text("{}")
    result = resume_small(run)
    assert "step-4" in result.problems[0]["message"]
    assert result.problems[0]["severity"] == "warning"
    assert_same_run(run, whole)


def test_without_a_valid_checkpoint_it_exits_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2)
    run, _ = run_small(tmp_path)
    (run.checkpoints_path / "step-2" / "state.json").unlink()
    steps = (run.path / "steps.jsonl").read_bytes()
    result = resume_small(run)
    assert (result.status, result.exit_code) == ("failed", 4)
    assert (run.path / "steps.jsonl").read_bytes() == steps


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (["task.model={kind: smallnet, width: 6}"], "here"),
        (["optim={kind: adam, lr: 0.1}"], "is unknown"),
        (["train.ema=0.5"], "is unknown"),
        (["precision.mode=bf16-pure"], "bfloat16"),
    ],
)
def test_a_checkpoint_of_another_run_exits_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[str], what: str
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2, 4)
    run, _ = run_small(tmp_path)
    foreign, _ = run_small(tmp_path, *other, name="foreign")
    (run.checkpoints_path / "step-2").rename(tmp_path / "away")
    (foreign.checkpoints_path / "step-2").rename(run.checkpoints_path / "step-2")
    result = resume_small(run)
    assert (result.status, result.exit_code) == ("failed", 4)
    assert "it is not of this run" in (result.reason or "")
    assert what in (result.reason or "")


@pytest.mark.parametrize("wrong", ["foreign", "state", "random"])
def test_what_does_not_fit_is_passed_over_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """It verifies, but is of another run, of another version, or holds no random state."""
    whole, _ = run_small(tmp_path, EVERY_OTHER, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        run = killed_run(tmp_path, EVERY_OTHER)
    other, _ = run_small(tmp_path, "task.model.width=6", name="other")
    path = run.checkpoints_path / "step-4"
    if wrong == "foreign":
        (other.checkpoints_path / "step-4").rename(path)
    else:
        tensors, state = checkpoint.load(Checkpoint(run.checkpoints_path / "step-2", 2))
        state["attempted"] = state["engine"]["attempted"] = 4
        if wrong == "state":
            state["of_a_later_version"] = 1
        else:
            tensors["rng.cpu"] = tensors["rng.cpu"][:7]
        checkpoint.save(run.checkpoints_path, 4, tensors, state, keep_last=2)
    result = resume_small(run)
    (problem,) = result.problems
    assert problem["message"].startswith("checkpoint step-4 cannot be used: it ")
    assert "\n" not in problem["message"]
    assert_same_run(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_library_makes_an_error_of_is_still_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        run = killed_run(tmp_path, EVERY_OTHER)

    def load(found: Checkpoint) -> Any:
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


def test_without_its_attempts_a_run_still_goes_on(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path)
    shutil.rmtree(run.path / "attempts")
    assert resume_small(run, "train.steps=6").status == "done"
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    run_small(tmp_path, "eval.every=2 steps", EVERY_OTHER)
    for name in ("recipe.yaml", "plan.json", "recipe.source.yaml", "1", "attempts"):
        assert name in synced[: synced.index("steps.jsonl")]  # before step 1
    first = synced.index("state.json")
    assert {"steps.jsonl", "evals.jsonl"} <= set(synced[:first])
    last = len(synced) - synced[::-1].index("model.safetensors") - 1
    assert synced[last + 1 :][-4:] == ["final.tmp", "run", "result.json.tmp", "run"]


def test_steps_at_the_floor_are_counted_across_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = "init_scale: 1e30, min_scale: 1e30, max_scale: 1e30"
    floor = f"precision={{mode: fp16, loss_scale: {{kind: dynamic, {scales}}}}}"
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 1)
        run, _ = run_small(tmp_path, floor)
    result = resume_small(run)
    assert result.status == "diverged"
    assert "step 2: the loss scale is at its floor" in (result.reason or "")


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
    _at_calls(monkeypatch, (3,), twice)
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


@pytest.mark.parametrize("name", ["0", "999999999", "1.tmp", "x"])
def test_any_attempt_but_the_first_goes_on(tmp_path: Path, name: str) -> None:
    run, _ = run_small(tmp_path)
    (run.path / "attempts/1").rename(run.path / "attempts" / name)
    for steps in (6, 8):
        assert resume_small(run, f"train.steps={steps}").status == "done"
    assert [row["step"] for row in rows(run)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "folder") for name in ("attempts", "checkpoints", "final", "final.tmp")]
    + [(name, "file") for name in ("steps.jsonl", "rollbacks.jsonl", "result.json.tmp", "lock")],
)
def test_what_is_of_another_kind_is_refused_before_anything_is_cut(
    tmp_path: Path, name: str, kind: str
) -> None:
    run, _ = run_small(tmp_path)
    path = run.path / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.write_text("x")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=f"`{name}` is not a {kind}") as caught:
        RunDirectory.open(run.path)
    assert caught.value.exit_code == Exit.USAGE


def test_a_huge_result_is_none(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path)
    assert run.result() is not None
    with (run.path / "result.json").open("ab") as file:
        file.truncate(2**40)
    assert run.result() is None


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4])
def test_a_compiled_model_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Step 1 is computed before the model is compiled: also after a resume from step 0."""
    overrides = ["engine.compile=true", "train.on_nonfinite=rollback", EVERY_OTHER]
    whole, _ = run_small(tmp_path, *overrides, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, at)
        run = killed_run(tmp_path, *overrides)
    resume_small(run)
    assert_same_run(run, whole)
    assert (run.path / "attempts/2/observed.json").exists() == (at == 2)


@pytest.mark.parametrize(
    "wrong", [{"attempted": 1}, {"applied": 3}, {"evaluated": 2}, {"steps": "x"}, {"more": 1}]
)
def test_a_state_that_cannot_be_exits_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2)
    run, _ = run_small(tmp_path)
    tensors, state = checkpoint.load(Checkpoint(run.checkpoints_path / "step-2", 2))
    checkpoint.save(run.checkpoints_path, 2, tensors, state | wrong, keep_last=1)
    result = resume_small(run)
    assert (result.status, result.exit_code) == ("failed", 4)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "train.steps=7", EVERY_OTHER, "output.keep_last=2")
    assert {path.name for path in run.checkpoints_path.iterdir()} == {"step-6", "step-7"}
    run, _ = run_small(tmp_path, "output.checkpoint_every=null", name="none")
    assert not any(run.checkpoints_path.iterdir())


def test_a_diverged_state_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static = "precision={mode: fp16, loss_scale: {kind: static, scale: 1e30}}"
    skips = "train={steps: 20, global_batch_size: 16, max_consecutive_skips: 2}"
    signal_at(monkeypatch, signal.SIGTERM, 2)
    run, result = run_small(tmp_path, static, skips)
    assert (result.status, result.checkpoint) == ("diverged", None)
    assert not any(run.checkpoints_path.iterdir())


def test_a_run_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path)
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, tmp_path / "run")
    with pytest.raises(UserError, match="writes to this run") as caught:
        RunDirectory.open(run.path)
    assert caught.value.exit_code == Exit.USAGE
    run.close()
    RunDirectory.open(run.path).close()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("steps.jsonl", lambda path: path.symlink_to("/etc/hostname")),
        ("lock", lambda path: path.symlink_to("/dev/null")),
        ("attempts/2", lambda path: path.symlink_to("/tmp")),
        ("evals.jsonl", lambda path: path.unlink(missing_ok=True) or __import__("os").mkfifo(path)),
    ],
)
def test_a_run_directory_with_links_or_devices_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    run, _ = run_small(tmp_path)
    path = run.path / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(UserError, match="neither a file nor a folder") as caught:
        RunDirectory.open(run.path)
    assert caught.value.exit_code == Exit.USAGE


def test_what_is_not_a_run_is_refused_saying_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, found in (
        ("missing", "no such folder"),
        ("file", "is a file"),
        ("folder", "not a run: no recipe.yaml, but nothing"),
        ("", "not a run: no recipe.yaml, but file, folder"),
    ):
        with pytest.raises(UserError, match=found) as caught:
            RunDirectory.open(tmp_path / name)
        assert caught.value.exit_code == Exit.USAGE


def test_tensorboard_hides_the_steps_that_were_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        run = killed_run(tmp_path, "output.tensorboard=true", EVERY_OTHER)
    resume_small(run)
    events = event_accumulator.EventAccumulator(str(run.tensorboard_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
