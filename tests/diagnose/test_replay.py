"""A step of a run once more: the same numbers, beside shadows."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mpcli.diagnose.replay import chosen_step, in_sums, is_quick, replay
from mpcli.diagnose.stage import Stage
from mpcli.precision.sensitive import last_layer
from mpcli.recipe.errors import UserError
from mpcli.recipe.precision import DynamicScale, LossScale, NoScale
from mpcli.records import ForeignRun, Replay, RollbackRecord, StepRecord
from mpcli.rundir import RunDirectory
from mpcli.tasks import image_classification
from tests.diagnose.faulty_runs import faulty_run
from tests.small import resume_small, run_small

SHORT = ("train.steps=3", "train.micro_batch_size=6", "output.checkpoint_every=null")


def replayed(run: RunDirectory, step: int | None = None) -> tuple[Replay, list[str]]:
    told: list[str] = []
    return replay(RunDirectory.read(run.path), step=step, tell=told.append), told


def contents(run: RunDirectory) -> dict[str, str]:
    files = (path for path in run.path.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("mode", ["fp32", "fp16", "bf16-master", "fp16-pure"])
def test_a_step_is_the_same_bit_for_bit(tmp_path: Path, mode: str) -> None:
    run, _ = run_small(tmp_path, f"precision.mode={mode}", *SHORT)
    before = contents(run)
    found, told = replayed(run)
    assert (found.step, found.checkpoint, found.steps_again) == (3, None, 2)
    assert "running steps 1 to 2 again, from the beginning" in told
    assert found.reproduced and found.finite
    assert (found.origin, found.parting, found.nondeterministic) == (None, None, ())
    assert found.micro_batches == 3
    assert contents(run) == before
    head = next(row for row in found.modules if row.module == "head")
    assert head.output and head.grad_output and head.parameter_grad and head.bf16_output
    if mode == "fp32":
        assert head.output.error == head.grad_output.error == head.parameter_grad.error == 0
        assert head.bf16_output.error > 0
    else:
        assert 0 < head.output.error < 0.05
        assert 0 < head.grad_output.error < 0.05
        assert 0 < head.parameter_grad.error < 0.05


def test_it_goes_on_from_the_nearest_checkpoint_that_can_be_used(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "output.checkpoint_every=1 steps", "output.keep_last=9")
    found, told = replayed(run)
    assert (found.step, found.checkpoint, found.steps_again) == (4, 3, 0)
    assert found.reproduced
    state = run.checkpoints_path / "step-3" / "state.json"
    state.write_text(state.read_text().replace("3", "2", 1))
    found, told = replayed(run)
    assert (found.checkpoint, found.steps_again) == (2, 1)
    assert found.reproduced
    assert any("step-3 is passed over" in text for text in told)
    assert "running step 3 again, from step-2" in told


def test_a_bad_batch_is_the_inputs_fault(tmp_path: Path, bad: dict[int, float]) -> None:
    bad[2] = math.nan
    run, result = run_small(tmp_path, "train.on_nonfinite=stop", *SHORT)
    assert result.status == "diverged"
    found, _ = replayed(run)
    assert found.step == 2 and found.reproduced and not found.finite
    assert found.origin is not None
    assert (found.origin.phase, found.origin.value) == ("input", "nan")


def test_the_batch_is_the_one_that_the_run_kept(tmp_path: Path, bad: dict[int, float]) -> None:
    bad[2] = math.nan
    run, _ = run_small(tmp_path, "train.on_nonfinite=stop", *SHORT)
    assert replayed(run)[0].flight_differs == ()
    bad.clear()  # the data set is another one now
    found, told = replayed(run)
    assert found.flight_differs == ("batch",)
    assert any("the batch of step 2 is not what the run kept of it" in text for text in told)
    assert found.reproduced and found.origin and found.origin.phase == "input"
    assert replayed(run, 1)[0].flight_differs is None


def test_the_random_state_is_the_one_that_the_run_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plugin = faulty_run(tmp_path, "transformer", "embed", "backward-inf")
    original = Stage.bring_to

    def bring_to(*given: Any) -> Any:
        start = original(*given)
        torch.rand(1)
        return start

    monkeypatch.setattr(Stage, "bring_to", bring_to)
    found = replay(run, plugin=plugin)
    assert found.flight_differs == ("random state",)
    assert found.reproduced and math.isfinite(found.loss)


@pytest.mark.parametrize(
    "changed",
    [
        {"batch.inputs": torch.zeros(0, 1, 8, 8)},
        {"batch.inputs": torch.zeros(())},
        {"batch.inputs": torch.zeros(3, 1, 8, 8)},
        {"batch.targets": torch.zeros(16)},
        {"batch.other": torch.zeros(16)},
        {"rng.cpu": torch.zeros(3)},
        {"rng.cpu": torch.zeros(3, dtype=torch.uint8)},
    ],
)
def test_what_was_kept_and_is_not_of_the_run_is_refused(
    tmp_path: Path, bad: dict[int, float], changed: dict[str, Tensor]
) -> None:
    bad[1] = math.nan
    run, _ = run_small(tmp_path, *SHORT)
    path = run.flights_path / "step-1" / "batch.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | changed, path)
    with pytest.raises(UserError) as error:
        replayed(run)
    assert error.value.exit_code == 4


@pytest.mark.parametrize("step", [99, 0, -1])
def test_a_row_of_no_step_of_the_plan_is_refused(tmp_path: Path, step: int) -> None:
    run, _ = run_small(tmp_path, *SHORT)
    run.append_steps([row(step)])
    with pytest.raises(UserError, match=f"row of step {step}, and the plan has 3") as error:
        replayed(run)
    assert error.value.exit_code == 4


@pytest.mark.parametrize("checkpoint", [99, 2, -1])
def test_a_run_that_cannot_have_gone_back_as_it_says_is_refused(
    tmp_path: Path, checkpoint: int
) -> None:
    run, _ = run_small(tmp_path, *SHORT)
    back = {"step": 2, "attempt": 1, "checkpoint": checkpoint, "reason": "x"}
    fields = RollbackRecord.model_fields
    back = {name: back.get(name, 1) for name in fields}
    (run.path / "rollbacks.jsonl").write_text(json.dumps(back) + "\n")
    assert list(run.rollbacks())
    with pytest.raises(UserError, match="goes back to a step") as error:
        replayed(run)
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("device", "banana", 4),
        ("device", "cuda:x", 4),
        ("device", "cuda:999", 3),
        ("micro_batch_size", 0, 4),
        ("accumulation", 0, 4),
        ("steps", 0, 4),
        ("fp32_modules", ["nowhere"], 4),
    ],
)
def test_a_plan_that_was_edited_is_refused(
    tmp_path: Path, field: str, value: object, code: int
) -> None:
    run, _ = run_small(tmp_path, *SHORT)
    path = run.attempt_path / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError) as error:
        replayed(run)
    assert error.value.exit_code == code


def test_how_far_it_is_told_while_it_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = run_small(tmp_path, *SHORT)
    monkeypatch.setattr("mpcli.diagnose.stage.TELL_EVERY", -1.0)
    _, told = replayed(run)
    assert "1 of 2 steps are run again" in told
    monkeypatch.setattr("mpcli.diagnose.stage.TELL_EVERY", 3600.0)
    _, told = replayed(run)
    assert not any("steps are run again" in text for text in told)


@pytest.mark.parametrize("kept", [True, False])
def test_it_goes_back_where_the_run_did(tmp_path: Path, bad: dict[int, float], kept: bool) -> None:
    bad[4] = math.nan
    run, _ = run_small(
        tmp_path,
        "train.steps=7",
        "train.on_nonfinite=rollback",
        "output.checkpoint_every=2 steps",
        "output.keep_last=9",
    )
    for name in ("step-4", "step-6", *(() if kept else ("step-2", "step-0"))):
        folder = run.checkpoints_path / name
        for file in folder.iterdir() if folder.exists() else ():
            file.unlink()
        if folder.exists():
            folder.rmdir()
    found, _ = replayed(run, 6)
    assert found.reproduced
    # Step 5 follows the state of step 2; with that checkpoint steps 3 and 4 need not be run.
    assert (found.checkpoint, found.steps_again) == ((2, 1) if kept else (None, 5))


def test_a_resumed_runs_steps_have_the_recipe_of_their_attempt(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "output.checkpoint_every=1 steps", "output.keep_last=9")
    resume_small(run, "train.steps=6", "train.micro_batch_size=4")
    later, _ = replayed(run)
    assert (later.step, later.attempt, later.micro_batches) == (6, 2, 4)
    earlier, _ = replayed(run, 3)
    assert (earlier.step, earlier.attempt, earlier.micro_batches) == (3, 1, 1)
    assert later.reproduced and earlier.reproduced


def test_a_loss_scale_that_is_merely_too_high_is_told_apart(tmp_path: Path) -> None:
    scale = "{kind: dynamic, init_scale: 16777216}"
    run, _ = run_small(tmp_path, f"precision={{mode: fp16, loss_scale: {scale}}}", *SHORT[:1])
    found, _ = replayed(run)
    assert found.step == 3 and found.why == "the last step"  # it was skipped as all were
    assert found.origin is not None
    assert (found.origin.phase, found.origin.value) == ("backward", "inf")
    assert found.shadow_origins == {"unscaled": None, "fp32": None, "bf16": None}
    assert not found.finite


def test_a_module_that_gives_other_bits_each_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unsteady(nn.Linear):
        calls = 0

        def forward(self, values: Tensor) -> Tensor:
            Unsteady.calls += 1
            return super().forward(values) * (1 + Unsteady.calls * 1e-3)

    original = image_classification.build_model

    def build_model(options: Any, info: Any) -> nn.Module:
        model = original(options, info)
        model.get_submodule(last_layer(model)).__class__ = Unsteady
        return model

    run, _ = run_small(tmp_path, *SHORT)
    monkeypatch.setattr(image_classification, "build_model", build_model)
    found, _ = replayed(run)
    assert found.nondeterministic[0] != "" and "head" in found.nondeterministic
    assert found.reproduced is False


def test_shadows_have_the_dropout_of_the_run(tmp_path: Path) -> None:
    run, plugin = faulty_run(tmp_path, "transformer", "loss", "none")
    found = replay(run, plugin=plugin)
    assert found.reproduced and found.same_random_numbers
    assert found.parting is None
    layers = [f"encoder.layers.{number}.self_attn" for number in range(3)]
    assert [seen.module for seen in found.attention] == layers
    assert all(0 < seen.entropy < 1 and seen.saturated == 0 for seen in found.attention)
    (inputs,) = found.inputs  # beside those of another batch
    assert inputs.name == "inputs" and inputs.max != inputs.usual_max
    dropped = [row for row in found.modules if row.type == "Dropout"]
    assert dropped and all(row.output and row.output.flushed == 0 for row in dropped)


def test_a_layer_whose_rounding_loses_its_result_is_where_the_precisions_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cancelling(nn.Linear):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values) + 2000.0 - 2000.0

    original = image_classification.build_model

    def build_model(options: Any, info: Any) -> nn.Module:
        model = original(options, info)
        model.get_submodule(last_layer(model)).__class__ = Cancelling
        return model

    monkeypatch.setattr(image_classification, "build_model", build_model)
    run, _ = run_small(tmp_path, "precision.mode=fp16", *SHORT)
    found, _ = replayed(run)
    assert found.origin is None and found.parting is not None
    assert (found.parting.module, found.parting.phase) == ("head", "forward")


def test_without_a_kernel_for_bf16_there_is_no_shadow_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: nn.Linear, values: Tensor) -> Tensor:
        result = torch.nn.functional.linear(values, self.weight, self.bias)
        if result.dtype == torch.bfloat16:
            raise RuntimeError("\"linear\" not implemented for 'BFloat16'")
        return result

    monkeypatch.setattr(nn.Linear, "forward", forward)
    run, _ = run_small(tmp_path, *SHORT)
    found, told = replayed(run)
    assert "no shadow in bf16: \"linear\" not implemented for 'BFloat16'" in told
    assert found.shadow_losses.keys() == {"run", "fp32"}
    assert found.modules and all(row.bf16_output is None for row in found.modules)


def test_micro_batches_whose_gradients_add_up_to_infinity_are_told() -> None:
    weights = [nn.Parameter(torch.zeros(2, dtype=torch.float16)) for _ in range(2)]
    engine: Any = SimpleNamespace(names=["a.weight", "b.0.weight"], masters=weights)
    for weight in weights:
        weight.grad = torch.full((2,), 40000.0, dtype=torch.float16)
    assert in_sums(engine) is None
    for weight in weights:
        assert weight.grad is not None
        weight.grad += 40000.0
    found = in_sums(engine)
    assert found is not None
    assert (found.module, found.phase, found.value) == ("b.0", "backward", "inf")


def test_only_steps_of_the_run_can_be_asked_for(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, *SHORT)
    with pytest.raises(UserError) as error:
        replayed(run, 4)
    assert error.value.exit_code == 2
    assert error.value.problems[0].hint == "there are the steps 1 to 3"


@pytest.mark.parametrize("text", [None, "{", "\udcff"])
def test_a_plan_that_cannot_be_read_is_the_users_matter(tmp_path: Path, text: str | None) -> None:
    run, _ = run_small(tmp_path, *SHORT)
    plan = run.attempt_path / "plan.json"
    plan.unlink()
    if text is not None:
        plan.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError) as error:
        replayed(run)
    assert error.value.exit_code == 4


def test_a_loop_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    about = ForeignRun(
        loop="pytorch", model="M", parameters=1, optimizer="SGD", scaler=None, every=1
    )
    run = RunDirectory.create_foreign(about, {}, tmp_path / "run")
    run.close()
    with pytest.raises(UserError) as error:
        replayed(run)
    assert error.value.exit_code == 2
    assert "not mptrain's" in error.value.problems[0].what


def row(step: int, *, loss: float = 1.0, applied: bool = True, scale: float = 8.0) -> StepRecord:
    return StepRecord(
        step=step,
        attempt=1,
        loss=loss,
        lr=0.1,
        grad_norm=1.0,
        scale=scale,
        applied=applied,
        samples_per_second=1.0,
        memory_allocated_bytes=0,
        memory_peak_bytes=0,
    )


@pytest.mark.parametrize(
    ("rows", "scale", "expected"),
    [
        ([row(1), row(2)], NoScale(kind="none"), 2),
        ([row(1), row(2, applied=False), row(3)], NoScale(kind="none"), 2),
        ([row(1), row(2, loss=math.nan), row(3)], NoScale(kind="none"), 2),
        (
            [row(1, applied=False), row(2), row(3, loss=math.inf, applied=False)],
            DynamicScale(kind="dynamic", init_scale=8.0),
            3,
        ),
        (
            [row(1, applied=False), row(2), row(3, applied=False, scale=1.0)],
            DynamicScale(kind="dynamic", init_scale=8.0),
            3,
        ),
        (
            [row(1), row(2, applied=False), row(3, applied=False)],
            DynamicScale(kind="dynamic", init_scale=8.0),
            3,
        ),
        (
            [row(1), row(2, applied=False), row(3, applied=False), row(4, applied=False)],
            NoScale(kind="none"),
            2,
        ),
    ],
)
def test_the_step_to_explain_is_chosen(
    tmp_path: Path, rows: list[StepRecord], scale: LossScale, expected: int
) -> None:
    (tmp_path / "steps.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    chosen, why = chosen_step(RunDirectory(tmp_path), scale, None)
    assert chosen is not None and why
    assert chosen.step == expected


def test_the_record_is_strict_json(tmp_path: Path, bad: dict[int, float]) -> None:
    bad[1] = math.inf
    run, _ = run_small(tmp_path, *SHORT)
    found, _ = replayed(run)
    text = json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert text["origin"]["phase"] == "input"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("speeds", "quick"), [((1.0, 80.0, 80.0), True), ((80.0, 1.0, 1.0), False), ((1.0,), False)]
)
def test_how_long_it_takes_is_judged_by_most_steps(
    tmp_path: Path, speeds: tuple[float, ...], quick: bool
) -> None:
    run, _ = run_small(tmp_path, "train.steps=1")
    (row,) = run.steps()
    rows = [
        row.model_copy(update={"step": step, "samples_per_second": speed, "applied": step > 1})
        for step, speed in enumerate(speeds, 1)
    ]  # the first was skipped, so that it is the one to run again
    (run.path / "steps.jsonl").write_text("".join(f"{row.to_json()}\n" for row in rows))
    assert is_quick(run) is quick
