"""A run from recipe to result, in this process."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.images import ImageInfo
from mpcli.engines.local import LocalEngine
from mpcli.launch import launch
from mpcli.plan import make_plan
from mpcli.precision.statistics import Samples
from mpcli.recipe.load import load_recipe
from mpcli.rundir import RunDirectory
from mpcli.tasks import image_classification as task
from mpcli.tasks.vision import ConvBlock
from tests.clock import Clock, stop_time
from tests.host_reads import HostReads
from tests.small import CPU, Silent, run_small, small_recipe
from tests.tiny_cifar import write_tiny_cifar


def rows(run: RunDirectory, name: str = "steps.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name).read_text().splitlines()]


def weights(run: RunDirectory) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run.final_path / "model.safetensors")


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these attempted steps NaN."""
    loss, calls = task.loss, itertools.count(1)

    def spoilt(*arguments: Any) -> tuple[Tensor, int]:
        value, weight = loss(*arguments)
        if not torch.is_grad_enabled():  # the plan looks at shapes only
            return value, weight
        return value * (math.nan if next(calls) in steps else 1.0), weight

    monkeypatch.setattr(task, "loss", spoilt)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A step takes 25 s and an evaluation 100 s."""
    clock, step, evaluate = stop_time(monkeypatch), LocalEngine.step, task.evaluate

    def slow_step(self: LocalEngine) -> Any:
        clock.now += 25.0
        return step(self)

    def slow_evaluation(*arguments: Any) -> dict[str, float]:
        clock.now += 100.0
        return evaluate(*arguments)

    monkeypatch.setattr(LocalEngine, "step", slow_step)
    monkeypatch.setattr(task, "evaluate", slow_evaluation)
    return clock


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_run_leaves_what_the_contract_names(tmp_path: Path, mode: str) -> None:
    run, result = run_small(tmp_path, f"precision.mode={mode}", "train.steps=11")
    assert {path.name for path in run.path.iterdir()} == {
        "recipe.yaml",
        "recipe.source.yaml",
        "attempts",
        "steps.jsonl",
        "layers.jsonl",
        "evals.jsonl",
        "checkpoints",
        "final",
        "lock",
        "result.json",
    }
    assert {path.name for path in (run.path / "attempts" / "1").iterdir()} == {
        "plan.json",
        "environment.json",
        "observed.json",
        "log.rank0.txt",
    }
    steps = rows(run)
    assert [row["step"] for row in steps] == list(range(1, 12))
    assert set(steps[0]) == {
        "step",
        "attempt",
        "loss",
        "lr",
        "grad_norm",
        "scale",
        "applied",
        "samples_per_second",
        "memory_allocated_bytes",
        "memory_peak_bytes",
    }
    assert steps[0]["scale"] == (65536.0 if mode == "fp16" else 1.0)
    assert all(row["attempt"] == 1 for row in steps)
    applied = sum(row["applied"] for row in steps)
    assert applied >= (6 if mode == "fp16" else 11)  # the scale may have to come down first
    assert all(0 < row["memory_allocated_bytes"] <= row["memory_peak_bytes"] for row in steps)

    written = json.loads((run.path / "result.json").read_text())
    assert written == json.loads(result.to_json())
    assert written["status"] == "done"
    assert written["exit_code"] == 0
    assert (written["steps_attempted"], written["steps_applied"]) == (11, applied)
    assert written["steps_skipped"] == 11 - applied
    assert written["metrics"]["train"]["loss"] == pytest.approx(
        sum(row["loss"] for row in steps) / 11
    )
    evaluation = rows(run, "evals.jsonl")[-1]
    assert evaluation["step"] == 11
    assert written["metrics"]["eval"] == {
        "loss": evaluation["loss"],
        "accuracy": evaluation["accuracy"],
    }
    text = "".join(path.read_text() for path in run.path.rglob("*.json*"))
    assert str(tmp_path) not in text  # a run directory can be moved


def test_final_weights_are_those_that_were_evaluated(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path).recipe
    run, result = run_small(tmp_path, "train.ema=0.5", "train.steps=20")
    data = task.load_data(recipe.task, recipe.data)
    data.prepare(torch.device("cpu"))
    model = task.build_model(recipe.task, data.info)
    model.load_state_dict(weights(run))
    with torch.no_grad():
        metrics = task.evaluate(recipe.task, model.eval(), data.eval_batches(16))
    assert metrics == pytest.approx(result.metrics["eval"], rel=1e-5)
    about = json.loads((run.final_path / "model.json").read_text())
    assert about["task"]["model"] == {"kind": "smallnet", "width": 4}
    assert about["weights"] == "average"


def test_the_resolved_recipe_repeats_the_run(tmp_path: Path) -> None:
    first, _ = run_small(tmp_path, "train.seed=3", "precision.mode=fp16")
    again = load_recipe(first.recipe_path)
    plan = make_plan(again.recipe, CPU)
    second = RunDirectory.create(again, plan, {}, tmp_path / "again")
    launch(second, Silent())
    assert [row["loss"] for row in rows(first)] == [row["loss"] for row in rows(second)]
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(second)[name])


def test_weights_and_order_follow_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, seen = task.loss, []

    def watched(options: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if torch.is_grad_enabled():  # not the plan's
            seen.append((next(model.parameters()).detach().clone(), batch["targets"]))
        return loss(options, model, batch)

    monkeypatch.setattr(task, "loss", watched)
    for seed in (3, 4):
        run_small(tmp_path, "train.steps=1", f"train.seed={seed}", name=f"{seed}")
    for first, other in zip(*seen, strict=True):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("micro_batch_size", [7, 64])
def test_micro_batches_change_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int
) -> None:
    """Sum over total weight: an uneven last micro-batch counts by its samples."""

    def build_model(options: object, info: ImageInfo) -> nn.Module:  # without BatchNorm
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    monkeypatch.setattr(task, "build_model", build_model)
    whole, _ = run_small(tmp_path, name="whole")
    parts, _ = run_small(tmp_path, f"train.micro_batch_size={micro_batch_size}", name="parts")
    for expected, row in zip(rows(whole), rows(parts), strict=True):
        for number in ("loss", "grad_norm"):
            assert row[number] == pytest.approx(expected[number], rel=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_overflow_is_skipped_recorded_and_survived(tmp_path: Path) -> None:
    scale = "{kind: dynamic, init_scale: 1e12, max_scale: 1e12}"
    run, result = run_small(
        tmp_path, "precision.mode=fp16", f"precision.loss_scale={scale}", "train.steps=40"
    )
    steps = rows(run)
    skipped = [row for row in steps if not row["applied"]]
    assert skipped
    assert result.status == "done"
    assert result.steps_skipped == len(skipped)
    assert result.steps_applied == 40 - len(skipped)
    for row, following in itertools.pairwise(steps):
        assert following["scale"] == row["scale"] * (1.0 if row["applied"] else 0.5)
    assert all(row["grad_norm"] in ("inf", "nan") for row in skipped)


def test_endless_overflow_ends_the_run_with_exit_5(tmp_path: Path) -> None:
    run, result = run_small(
        tmp_path,
        "precision={mode: fp16, loss_scale: {kind: static, scale: 1e30}}",
        "train={steps: 500, global_batch_size: 16, max_consecutive_skips: 5}",
    )
    assert (result.status, result.exit_code) == ("diverged", 5)
    assert "steps in a row had NaN or infinite gradients" in (result.reason or "")
    assert 5 <= result.steps_attempted < 30
    assert result.steps_applied == 0
    assert len(rows(run)) == result.steps_attempted
    assert json.loads((run.path / "result.json").read_text())["checkpoint"] is None


@pytest.mark.parametrize(
    ("spoilt", "last"), [((2, 3, 4), 4), ((7, 8, 9), 9), ((1, 3, 4, 6, 7, 9), None)]
)
def test_only_skips_in_a_row_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: tuple[int, ...], last: int | None
) -> None:
    """Also where good steps follow in the rows that are read together."""
    spoil(monkeypatch, *spoilt)
    run, result = run_small(
        tmp_path, "train={steps: 20, global_batch_size: 16, max_consecutive_skips: 3}"
    )
    assert result.status == ("done" if last is None else "diverged")
    assert last is None or f"step {last}: 3 steps in a row" in (result.reason or "")
    assert result.steps_attempted == len(rows(run))
    assert result.steps_skipped == sum(not row["applied"] for row in rows(run))


def diverge(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Multiply every loss."""
    loss = task.loss

    def spoilt(*arguments: Any) -> tuple[Tensor, int]:
        value, weight = loss(*arguments)
        return value * factor, weight

    monkeypatch.setattr(task, "loss", spoilt)


@pytest.mark.parametrize(
    ("factor", "cause"),
    [
        (math.inf, "the loss itself is inf, so the trouble begins in forward"),
        (1e12, "the loss is finite, so the gradients overflow in backward"),
    ],
)
@pytest.mark.parametrize("floor", ["min_scale: 4", "min_scale: [[0, 4], [100, 8]]"])
def test_overflow_at_the_scales_floor_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, cause: str, floor: str
) -> None:
    diverge(monkeypatch, factor)
    run, result = run_small(
        tmp_path,
        f"precision={{mode: fp16-pure, loss_scale: {{kind: dynamic, init_scale: 16, {floor}}}}}",
        "train.steps=40",
    )
    assert (result.status, result.exit_code) == ("diverged", 5)
    assert [row["scale"] for row in rows(run)][:4] == [16, 8, 4, 4]
    (problem,) = result.problems
    assert problem["message"].startswith("step 4: the loss scale is at its floor (4)")
    assert cause in problem["message"]
    assert "mptrain diagnose" in problem["hint"]
    assert problem["finding"] == "scale-collapse"


def test_a_single_overflow_at_the_floor_is_a_skipped_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 1, 3)
    dynamic = "{kind: dynamic, init_scale: 1}"
    _, result = run_small(tmp_path, f"precision={{mode: fp16, loss_scale: {dynamic}}}")
    assert (result.status, result.steps_skipped) == ("done", 2)


def test_a_scheduled_scale_follows_attempted_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2)
    scheduled = "{kind: scheduled, points: [[0, 1024], [2, 256]]}"
    run, _ = run_small(tmp_path, f"precision={{mode: fp16, loss_scale: {scheduled}}}")
    assert [(row["scale"], row["applied"]) for row in rows(run)] == [
        (1024, True),
        (1024, False),
        (256, True),
        (256, True),
    ]


@pytest.mark.parametrize("mode", ["fp16-master", "bf16-master"])
def test_masters_are_what_final_holds_and_half_weights_what_is_evaluated(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: dict[str, Tensor] = {}
    evaluate = task.evaluate

    def note(options: Any, model: nn.Module, batches: Any) -> dict[str, float]:
        evaluated.update({k: v.clone() for k, v in model.state_dict().items()})
        return evaluate(options, model, batches)

    monkeypatch.setattr(task, "evaluate", note)
    run, _ = run_small(tmp_path, f"precision.mode={mode}")
    final = weights(run)
    assert {value.dtype for value in final.values()} == {torch.float32, torch.int64}
    assert set(final) == set(evaluated)
    rounded = 0
    for name, value in evaluated.items():
        assert torch.equal(final[name].to(value.dtype), value)
        rounded += not torch.equal(final[name], value.to(final[name].dtype))
    assert rounded >= 4  # every convolution has weights that half precision cannot hold


@pytest.mark.parametrize("mode", ["fp16-pure", "bf16-pure"])
def test_final_holds_the_half_weights_of_pure_modes(tmp_path: Path, mode: str) -> None:
    run, _ = run_small(tmp_path, f"precision.mode={mode}")
    half = {"fp16-pure": torch.float16, "bf16-pure": torch.bfloat16}[mode]
    saved = [value for value in weights(run).values() if value.is_floating_point()]
    assert {value.dtype for value in saved} == {torch.float32}  # `output.final_dtype`
    assert all(torch.equal(value, value.to(half).float()) for value in saved if value.ndim > 1)


def test_on_nonfinite_stop_names_the_step(tmp_path: Path) -> None:
    _, result = run_small(
        tmp_path,
        "precision={mode: fp16, loss_scale: {kind: static, scale: 1e30}}",
        "train.on_nonfinite=stop",
        "train.steps=500",
    )
    assert (result.status, result.exit_code) == ("diverged", 5)
    assert "step 1:" in (result.reason or "")


def test_evaluations_fall_due(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "eval.every=3 steps", "train.steps=7")
    assert [row["step"] for row in rows(run, "evals.jsonl")] == [3, 6, 7]
    run, _ = run_small(
        tmp_path,
        "eval.every=1 epoch",
        "train={epochs: 2, global_batch_size: 700}",
        name="epochs",
    )
    assert [row["step"] for row in rows(run, "evals.jsonl")] == [2, 4]


@pytest.mark.usefixtures("clock")
def test_evaluations_fall_due_by_the_minute(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "eval.every=5 minutes", "train.steps=21")
    assert [row["step"] for row in rows(run, "evals.jsonl")] == [12, 20, 21]


@pytest.mark.usefixtures("clock")
def test_rates_leave_evaluations_out(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "eval.every=2 steps", "train.steps=5")
    assert [row["samples_per_second"] for row in rows(run)] == [16 / 25] * 5
    assert [row["seconds"] for row in rows(run, "evals.jsonl")] == [100.0] * 3


@pytest.mark.usefixtures("clock")
def test_slow_steps_are_in_the_file_and_shown_one_by_one(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    run = RunDirectory.create(recipe, make_plan(recipe.recipe, CPU), {}, tmp_path / "run")
    display, written = Silent(), []
    display.steps = lambda new: written.append(len(rows(run)))  # type: ignore[method-assign]
    launch(run, display)
    assert written == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "mode",
    [
        "{mode: fp16}",
        "{mode: fp16-master}",
        "{mode: bf16-pure, stochastic_rounding: true, sensitive_layers: [norm]}",
    ],
)
def test_steps_between_due_records_read_nothing_on_the_host(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole loop, records included: the only reads are the evaluation's."""
    as_on_a_gpu = functools.partial(Samples, on_host=False)
    monkeypatch.setattr("mpcli.engines.local.Samples", as_on_a_gpu)
    monkeypatch.setattr("mpcli.engines.shadow.Samples", as_on_a_gpu)
    recipe = small_recipe(
        tmp_path,
        f"precision={mode}",
        "train.steps=24",
        "train.ema=0.9",
        "probe={every: 5, shadow_every: 10}",
    )
    run = RunDirectory.create(recipe, make_plan(recipe.recipe, CPU), {}, tmp_path / "run")
    display = Silent()
    counts: list[int] = []
    with HostReads() as reads:
        display.start = lambda plan, recipe: counts.append(reads.count)  # type: ignore[method-assign]
        display.steps = lambda new: counts.append(reads.count)  # type: ignore[method-assign]
        launch(run, display)
    assert len(counts) >= 4
    assert len(set(counts)) == 1


def test_learning_rates_in_rows_follow_the_applied_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2)
    run, _ = run_small(tmp_path, "optim.schedule={kind: linear}", "train.steps=5")
    assert [row["lr"] for row in rows(run)] == pytest.approx([0.1, 0.08, 0.08, 0.06, 0.04])


@pytest.fixture
def inexact() -> Iterator[list[tuple[Any, str]]]:
    """torch's switches that round products or their sums, all on."""
    matmul = torch.backends.cuda.matmul
    switches = [
        (matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
    ]
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, True)
    yield switches
    for (module, name), value in zip(switches, before, strict=True):
        setattr(module, name, value)


def test_products_are_exact_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inexact: list[tuple[Any, str]]
) -> None:
    step, seen = LocalEngine.step, []

    def watched(self: LocalEngine) -> Any:
        seen.extend(getattr(module, name) for module, name in inexact)
        return step(self)

    monkeypatch.setattr(LocalEngine, "step", watched)
    run_small(tmp_path)
    assert seen == [False] * 4 * 4
    assert all(getattr(module, name) for module, name in inexact)


def test_channels_last_holds_for_images_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_cifar(tmp_path / "cifar")
    data = f"data={{kind: cifar10, path: {tmp_path / 'cifar'}, augment: []}}"
    usual, _ = run_small(tmp_path, data, "train.steps=1", name="usual")
    loss, seen = task.loss, []

    def watched(options: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        for tensor in (batch["inputs"], *model.parameters()):
            if tensor.ndim == 4 and torch.is_grad_enabled():  # not the plan's
                seen.append(tensor.is_contiguous(memory_format=torch.channels_last))
        return loss(options, model, batch)

    monkeypatch.setattr(task, "loss", watched)
    nhwc, _ = run_small(tmp_path, data, "train.steps=1", "task.channels_last=true", name="nhwc")
    assert seen == [True] * 5  # the images and four convolutions
    assert rows(nhwc)[0]["loss"] == pytest.approx(rows(usual)[0]["loss"], rel=1e-5)


def test_a_bug_leaves_a_result_and_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcli.engines.local.LocalEngine.step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_small(tmp_path)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (written["status"], written["exit_code"]) == ("failed", 1)
    assert "ZeroDivisionError" in (tmp_path / "run/attempts/1/log.rank0.txt").read_text()


@pytest.mark.parametrize(
    ("error", "code", "field"),
    [
        (
            RuntimeError("cumsum_cuda does not have a deterministic implementation, but"),
            2,
            "train.deterministic",
        ),
        (
            RuntimeError("\"avg_pool3d_out_frame\" not implemented for 'Half'"),
            3,
            "precision.mode",
        ),
    ],
)
def test_what_torch_refuses_comes_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, field: str
) -> None:
    def step(self: object) -> None:
        raise error

    monkeypatch.setattr("mpcli.engines.local.LocalEngine.step", step)
    _, result = run_small(tmp_path)
    assert (result.status, result.exit_code) == ("failed", code)
    assert result.problems[0]["path"] == field
    assert field in result.problems[0]["hint"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["precision={mode: fp16, loss_scale: {kind: static, scale: 1e30}}"], "nothing was learnt"),
        (["optim.lr=1e30", "train.steps=1"], "evaluation data is not finite"),
    ],
)
def test_a_model_that_learnt_nothing_usable_is_not_left_as_final(
    tmp_path: Path, overrides: list[str], reason: str
) -> None:
    run, result = run_small(tmp_path, *overrides)
    assert (result.status, result.exit_code, result.checkpoint) == ("diverged", 5, None)
    assert reason in (result.reason or "")
    assert not run.final_path.exists()


def test_ctrl_c_keeps_every_finished_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = LocalEngine.step, []

    def interrupted(self: LocalEngine) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(LocalEngine, "step", interrupted)
    run, result = run_small(tmp_path)
    assert (result.status, result.exit_code) == ("interrupted", 130)
    assert result.steps_attempted == len(rows(run)) == 3


def test_nan_loss_is_recorded_raw_in_strict_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 1, 2, 3, 4)
    run, result = run_small(tmp_path)
    assert [row["loss"] for row in rows(run)] == ["nan"] * 4
    assert result.steps_skipped == 4
    assert json.loads((run.path / "result.json").read_text())["metrics"]["train"]["loss"] == "nan"


@pytest.mark.slow
def test_deterministic_and_compiled_runs_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain = run_small(tmp_path, name="plain")
    switches = []
    monkeypatch.setattr(
        Silent,
        "steps",
        lambda self, rows: switches.append(torch.are_deterministic_algorithms_enabled()),
    )
    _, deterministic = run_small(tmp_path, "train.deterministic=true", name="deterministic")
    assert set(switches) == {True}
    assert deterministic.metrics == plain.metrics
    assert not torch.are_deterministic_algorithms_enabled()
    run, compiled = run_small(tmp_path, "engine.compile=true", name="compiled")
    assert compiled.metrics["eval"]["loss"] == pytest.approx(
        plain.metrics["eval"]["loss"], rel=1e-3
    )
    assert not any("_orig_mod" in name for name in weights(run))


def test_activation_checkpointing_recomputes_and_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = ConvBlock.forward, []

    def counted(self: ConvBlock, images: Tensor) -> Tensor:
        calls.append(self)
        return forward(self, images)

    monkeypatch.setattr(ConvBlock, "forward", counted)
    plain, _ = run_small(tmp_path, name="plain")
    without = len(calls)
    recomputed, _ = run_small(tmp_path, "engine.activation_checkpointing=true", name="recomputed")
    assert len(calls) - without == without + 4 * 4  # every block in every step once more
    assert [row["loss"] for row in rows(plain)] == [row["loss"] for row in rows(recomputed)]
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(recomputed)[name])


@pytest.mark.slow
def test_digits_in_fp16_and_bf16_end_within_a_point_of_fp32(tmp_path: Path) -> None:
    accuracy = {}
    for mode in ("fp32", "bf16", "fp16"):
        loaded = load_recipe(Path("recipes") / f"digits-{mode}.yaml")
        run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, tmp_path / mode)
        accuracy[mode] = launch(run, Silent()).metrics["eval"]["accuracy"]
    assert accuracy["fp32"] >= 0.97
    assert abs(accuracy["fp16"] - accuracy["fp32"]) <= 0.01
    assert abs(accuracy["bf16"] - accuracy["fp32"]) <= 0.01
