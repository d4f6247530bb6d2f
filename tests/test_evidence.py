"""What a run keeps so that it can be explained: sampled steps, shadows, flights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpcli import flight, rundir
from mpcli.data.batch import Batch
from mpcli.engines.local import LocalEngine
from mpcli.engines.shadow import Shadow
from mpcli.flight import FIRST, NEWEST, flights, load_flight
from mpcli.precision.probe import ActivationHooks
from mpcli.precision.statistics import Samples
from mpcli.records import FlightRecord, LayerRecord
from mpcli.rundir import RunDirectory
from tests.small import resume_small, run_small, small_recipe
from tests.stopped import MODES, assert_same_run, kill_at, killed_run
from tests.test_trainer import spoil

EVERY_STEP = "probe.every=1"


def layer_rows(run: RunDirectory) -> list[LayerRecord]:
    return list(run.layers())


def text(run: RunDirectory, name: str = "layers.jsonl") -> str:
    lines = (run.path / name).read_text().splitlines()
    return "\n".join(json.dumps({**json.loads(line), "attempt": 0}) for line in lines)


def test_the_first_step_and_every_nth_are_sampled(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "train.steps=9", "probe.every=4")
    rows = layer_rows(run)
    assert sorted({row.step for row in rows}) == [1, 4, 8]
    assert {row.tensor for row in rows} == {"output", "grad_output", "weight", "grad", "update"}
    of_one = [row for row in rows if row.step == 4]
    assert len({(row.tensor, row.name, row.call) for row in of_one}) == len(of_one)


def test_by_default_it_is_one_step_in_a_hundred_and_none_when_switched_off(tmp_path: Path) -> None:
    assert small_recipe(tmp_path).recipe.probe.every == 100
    run, _ = run_small(tmp_path, "probe.every=0")
    assert not (run.path / "layers.jsonl").exists()


@pytest.mark.parametrize("mode", MODES)
def test_the_training_is_the_same_with_and_without(tmp_path: Path, mode: str) -> None:
    about = ["train.steps=5", *MODES[mode]]
    plain, _ = run_small(tmp_path, *about, "probe.every=0", name="plain")
    probed, _ = run_small(tmp_path, *about, "probe={every: 1, shadow_every: 2}", name="probed")
    assert_same_run(probed, plain)


@pytest.mark.parametrize("mode", ["fp32", "fp16", "accumulation", "bf16-pure"])
def test_a_resumed_run_has_the_rows_of_one_that_was_never_stopped(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = ["train.steps=7", "probe.every=2", "output.checkpoint_every=2 steps", *MODES[mode]]
    whole, _ = run_small(tmp_path, *about, name="whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        run = killed_run(tmp_path, *about)
    resume_small(run)
    assert text(run) == text(whole)


def test_rows_hold_what_the_step_had(tmp_path: Path) -> None:
    """The first step again, by hand."""
    run, _ = run_small(
        tmp_path,
        "precision={mode: fp16, loss_scale: {kind: static, scale: 256}}",
        "train.clip={kind: norm, max_norm: 0.1}",
        "train.steps=1",
        EVERY_STEP,
    )
    (step,) = run.steps()
    rows = {(row.tensor, row.name): row for row in run.layers()}
    gradients = [row for row in rows.values() if row.tensor == "grad"]
    squares = sum((row.rms / 256) ** 2 * row.elements for row in gradients)
    assert squares**0.5 == pytest.approx(step.grad_norm, rel=1e-5)  # before the clipping
    assert (
        {row.scale for row in gradients}
        == {256.0}
        == {row.scale for row in rows.values() if row.tensor == "grad_output"}
    )
    updates = [row for row in rows.values() if row.tensor == "update"]
    moved = sum(row.rms**2 * row.elements for row in updates) ** 0.5
    assert moved == pytest.approx(0.1 * 0.1, rel=1e-3)  # lr times the clipped norm
    outputs = [row for row in rows.values() if row.tensor == "output"]
    assert "fp16" in {row.dtype for row in outputs}
    assert {row.would_flush for row in (*outputs, *gradients)} == {None}
    assert all(row.would_flush is not None for row in updates)


def test_a_shadow_tells_what_a_low_scale_flushes_and_that_a_good_one_does_not(
    tmp_path: Path,
) -> None:
    def flushed(scale: float) -> float:
        run, _ = run_small(
            tmp_path,
            f"precision={{mode: fp16, loss_scale: {{kind: static, scale: {scale}}}}}",
            "probe={every: 1, shadow_every: 1}",
            "train.steps=2",
            name=f"run-{scale}",
        )
        rows = [row for row in run.layers() if row.tensor == "grad_output" and row.step == 2]
        assert all(row.shadow for row in rows)
        return max(row.shadow.flushed for row in rows if row.shadow)

    assert flushed(2.0**-14) > 0.3
    assert flushed(2.0**10) < 0.01


def test_the_shadow_of_an_fp32_run_is_itself(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "probe={every: 1, shadow_every: 1}", "train.micro_batch_size=5")
    compared = [row.shadow for row in run.layers() if row.shadow]
    assert len(compared) > 20
    assert max(shadow.error for shadow in compared) < 1e-6


def test_shadows_come_only_when_they_are_due(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "train.steps=5", "probe={every: 2, shadow_every: 4}")
    assert {row.step for row in run.layers() if row.shadow} == {1, 4}
    assert {row.step for row in run.layers()} == {1, 2, 4}


@pytest.mark.parametrize(("mode", "shadows"), [("fp32", set()), ("fp16", {2, 3}), ("bf16", {2, 3})])
def test_steps_that_are_named_are_sampled_and_have_a_shadow_in_half(
    tmp_path: Path, mode: str, shadows: set[int]
) -> None:
    run, _ = run_small(
        tmp_path, f"precision.mode={mode}", "train.steps=4", "probe={every: 4, steps: [2, 3, 9]}"
    )
    assert {row.step for row in run.layers()} == {1, 2, 3, 4}
    assert {row.step for row in run.layers() if row.shadow} == shadows


def test_a_compiled_model_is_sampled_through_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled would run no hook; what runs here says which of the two ran."""
    stances: list[str] = []
    real = torch.compiler.set_stance

    def noted(stance: str) -> Any:
        stances.append(stance)
        return real(stance)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.compiler, "set_stance", noted)
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    run, _ = run_small(tmp_path, "engine.compile=true", "train.steps=3", "probe.every=2")
    assert compiled
    assert stances == ["force_eager"] * 2
    assert {row.step for row in run.layers()} == {1, 2}


def test_a_table_that_grows_is_thinned_and_keeps_its_newest_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "MAX_LAYER_BYTES", 150_000)
    run, _ = run_small(tmp_path, "train.steps=60", EVERY_STEP)
    assert (run.path / "layers.jsonl").stat().st_size <= 150_000
    steps = sorted({row.step for row in run.layers()})
    assert steps[-1] == 60
    assert len(steps) >= 2
    whole = {step: sum(row.step == step for row in run.layers()) for step in steps}
    assert len(set(whole.values())) == 1  # none is cut in two


def test_a_step_that_went_wrong_is_kept_with_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3)
    run, result = run_small(tmp_path, "train.steps=5", "probe.every=2")
    assert result.steps_skipped == 1
    (kept,) = flights(run)
    (row,) = [row for row in run.steps() if not row.applied]
    assert (kept.step, kept.scale, kept.applied) == (row.step, row.scale, False)
    tensors = load_flight(run, kept.step)
    assert len(tensors["batch.inputs"]) == 16
    assert tensors["rng.cpu"].dtype == torch.uint8
    table = (run.flights_path / f"step-{kept.step}" / "layers.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in table} == {2}


def test_the_random_state_of_a_flight_is_that_before_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[torch.Tensor] = []
    accumulate = LocalEngine.accumulate

    def noted(self: LocalEngine, *about: Any, **named: Any) -> Any:
        states.append(torch.get_rng_state())
        torch.rand(3)  # as a dropout would
        return accumulate(self, *about, **named)

    monkeypatch.setattr(LocalEngine, "accumulate", noted)
    spoil(monkeypatch, 4)
    run, _ = run_small(tmp_path, "train.steps=6")
    (kept,) = flights(run)
    assert torch.equal(load_flight(run, kept.step)["rng.cpu"], states[kept.step - 1])


def test_flights_are_bounded_in_number_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "MAX_BATCH_BYTES", 100)
    wrong = list(range(2, 32, 2))
    spoil(monkeypatch, *wrong)
    run, _ = run_small(tmp_path, "train.steps=33")
    kept = [about.step for about in flights(run)]
    assert kept == [*wrong[:FIRST], *wrong[-NEWEST:]]
    assert all("not stored" in about.batch for about in flights(run))
    assert all(set(load_flight(run, step)) == {"rng.cpu"} for step in kept)
    assert not [path for path in run.flights_path.iterdir() if path.suffix == ".tmp"]


def test_a_loss_that_is_not_finite_is_kept_when_the_run_ends_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3)
    run, result = run_small(tmp_path, "train.on_nonfinite=stop")
    assert result.exit_code == 5
    assert [about.step for about in flights(run)] == [3]


def test_a_resume_forgets_flights_of_steps_that_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = ["train.steps=6", "output.checkpoint_every=2 steps"]
    with monkeypatch.context() as patch:
        spoil(patch, 3)
        run, _ = run_small(tmp_path, *about)
    assert [kept.step for kept in flights(run)] == [3]
    flight.forget_flights(run, 2)
    assert flights(run) == []


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 2)

    def full(*about: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    run, result = run_small(tmp_path, "output.checkpoint_every=null")
    assert result.status == "done"
    assert any("records were lost" in problem["message"] for problem in result.problems)
    assert flights(run) == []
    assert not list(run.flights_path.iterdir())


def test_what_cannot_be_read_of_flights_is_left_out(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path)
    folder = run.flights_path / "step-2"
    folder.mkdir(parents=True)
    (folder / "flight.json").write_text("{")
    (run.flights_path / "step-x").mkdir()
    assert flights(run) == []


def test_observed_types_tell_what_a_module_got_multiplied_and_gave(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "precision.mode=bf16")
    observed = run.observed()
    convolutions = [seen for seen in observed.values() if seen.operands == "bf16"]
    assert convolutions
    first = next(seen for seen in convolutions if seen.inputs == "fp32")
    assert (first.stored, first.outputs) == ("fp32", "bf16")


def test_records_of_flights_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="extra"):
        FlightRecord.model_validate({"step": 1, "unknown": 2})


def test_a_shadow_draws_what_the_step_will_draw_and_leaves_it_to_draw() -> None:
    torch.manual_seed(0)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 1))

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
        return model(batch["inputs"]).sum(), len(batch)

    model, batch = build(), Batch({"inputs": torch.randn(6, 4)})
    weights = {name: p.detach() for name, p in model.named_parameters()}
    before = torch.get_rng_state()
    kept = Shadow(build, torch.device("cpu")).samples(weights, loss, [batch], 6)
    assert torch.equal(torch.get_rng_state(), before)
    samples = Samples(torch.device("cpu"))
    samples.begin(1.0, kept)
    with ActivationHooks(model, samples):
        total, _ = loss(model, batch)
    (total / 6).backward()
    rows = samples.finish().records(1, 1) or []
    assert [row.shadow and row.shadow.error for row in rows] == [0.0] * 6


def test_a_run_that_is_left_by_an_error_keeps_what_it_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2)
    kill_at(monkeypatch, 5)
    run = killed_run(tmp_path, "train.steps=8", EVERY_STEP, "output.checkpoint_every=null")
    assert sorted({row.step for row in run.layers()}) == [1, 2, 3, 4]
    assert [kept.step for kept in flights(run)] == [2]
