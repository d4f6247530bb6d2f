"""Faults of what is stored: real runs, checkpoints that are written for the purpose, and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpcli import Recorder
from mpcli.diagnose.checks.state import STATE
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding
from mpcli.diagnose.places import gather
from mpcli.diagnose.ranking import ranked
from mpcli.engines.local import LocalEngine
from mpcli.plan.memory_text import size_text
from mpcli.plan.micro_batch import halved, needed
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import load_plugin
from mpcli.rundir import RunDirectory
from tests.diagnose.checks.numeric_runs import causes, odd_run
from tests.diagnose.checks.numeric_runs import evidence_of as odd_evidence
from tests.diagnose.training_runs import PLUGIN, evidence_of, trained, training_run
from tests.small import run_small


def found(evidence: Evidence) -> list[Finding]:
    return ranked(finding for check in STATE for finding in check(evidence))


def of_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Evidence:
    """The evidence of a bare file of weights."""
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    return gather(path)


@pytest.mark.parametrize("model", ["mlp", "conv", "transformer"])
def test_sound_runs_have_no_finding(tmp_path: Path, model: str) -> None:
    assert found(trained(tmp_path, model, "precision.mode=bf16", again=True)) == []


def test_statistics_that_do_not_stand_for_the_data(tmp_path: Path) -> None:
    """Inputs far from 0, and running means that hardly follow: training is well, evaluation not."""
    evidence = trained(tmp_path, "conv", "task={bias: 5, momentum: 0.001}", again=True)
    (cause,) = found(evidence)
    assert (cause.id, cause.layers) == ("batchnorm-stats", ("2", "5"))
    assert cause.evidence["loss_with_running_statistics"] > 1  # type: ignore[operator]
    assert cause.confidence > found(replace(evidence, replay=None))[0].confidence


@pytest.mark.parametrize(
    ("value", "told"), [(float("nan"), "NaN"), (1e-9, "below BatchNorm's eps"), (1.0, None)]
)
def test_running_variances(tmp_path: Path, value: float, told: str | None) -> None:
    variance = torch.full((4,), value)
    evidence = of_tensors(tmp_path, {"bn.running_var": variance, "bn.weight": torch.ones(4)})
    causes = found(evidence)
    assert [(cause.id, cause.layers) for cause in causes] == (
        [("batchnorm-stats", ("bn",))] if told else []
    )
    assert told is None or told in causes[0].cause


def test_a_dead_channel_is_no_fault(tmp_path: Path) -> None:
    variance = torch.tensor([0.0, 0.5, 0.2])
    assert found(of_tensors(tmp_path, {"bn.running_var": variance})) == []


def test_statistics_that_a_skipped_step_spoilt_in_a_foreign_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    recorder = Recorder(model, optimizer, scaler, out=tmp_path / "run")
    for inputs in (torch.randn(8, 4), torch.full((8, 4), torch.inf), torch.randn(8, 4)):
        with recorder.step(inputs):
            optimizer.zero_grad()
            scaler.scale(model(inputs).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    recorder.close()
    (cause,) = found(gather(tmp_path / "run"))
    assert (cause.id, cause.layers, cause.step) == ("batchnorm-stats", ("1",), 2)


@pytest.mark.parametrize(
    ("weight", "severities"),
    [
        (torch.tensor([1.0, 1e5]), {"-": "info", "fp16": "error", "bf16": "info"}),
        (torch.full((4,), 1e-9), {"fp16": "warning"}),
        (torch.tensor([1.0, 1e-9]), {"fp16": None}),
    ],
)
def test_weights_that_fp16_cannot_hold(
    tmp_path: Path, weight: torch.Tensor, severities: dict[str, str | None]
) -> None:
    bare = of_tensors(tmp_path, {"layer.weight": weight, "other.weight": torch.ones(2)})
    for mode, severity in severities.items():
        (tmp_path / mode).mkdir()
        recipe = None
        if mode != "-":
            run = trained(tmp_path / mode, "mlp", "train.steps=1", f"precision.mode={mode}")
            recipe = run.recipe
        causes = found(replace(bare, recipe=recipe))
        assert [cause.severity for cause in causes] == ([severity] if severity else [])
        if causes:
            assert causes[0].id == "weights-exceed-fp16"
            assert causes[0].layers == ("layer",)


@pytest.mark.parametrize("seen_by", ["replay", "sample"])
def test_weights_that_are_nan_at_the_beginning_are_no_overflow(
    tmp_path: Path, seen_by: str
) -> None:
    evidence = odd_evidence(*odd_run(tmp_path, "nan-weights"), again=seen_by == "replay")
    alone = replace(evidence, facts=evidence.facts.model_copy(update={"weights": None}))
    if seen_by == "replay":
        alone = replace(alone, samples=())
    cause = causes(alone)[0]
    assert (cause.id, cause.phase, cause.layers) == ("bad-checkpoint", "input", ("2",))
    assert (cause.severity, cause.step) == ("error", 1)
    assert "the weights that the run began with" in cause.cause
    assert causes(alone) == [cause]  # what follows is no cause beside it
    assert "scale-collapse" in [one.id for one in cause.consequences]


@pytest.mark.parametrize("again", [True, False])
def test_weights_of_a_sampled_step_that_fp16_cannot_hold(tmp_path: Path, again: bool) -> None:
    evidence = odd_evidence(*odd_run(tmp_path, "large-weights", "train.steps=6"), again=again)
    evidence = replace(evidence, facts=evidence.facts.model_copy(update={"weights": None}))
    (cause,) = causes(evidence)
    assert (cause.id, cause.layers, cause.severity) == ("weights-exceed-fp16", ("2",), "error")
    assert cause.evidence["largest_weight"] == pytest.approx(7e4)
    assert cause.consequences
    assert all(one.id != "weights-exceed-fp16" for one in cause.consequences)
    assert "forward-overflow" in [one.id for one in cause.consequences]


def test_a_large_parameter_that_nothing_multiplies_in_fp16_is_no_fault(tmp_path: Path) -> None:
    evidence = odd_evidence(*odd_run(tmp_path, "large-scale", "train.steps=2"), again=False)
    assert evidence.facts.run and evidence.facts.run.types["2"].operands == "-"
    assert max(row.max for row in evidence.samples[0].of("weight")) >= 7e4
    assert found(evidence) == []
    assert found(replace(evidence, facts=evidence.facts.model_copy(update={"weights": None}))) == []


def test_biases_that_have_hardly_left_zero_are_no_fault(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "precision.mode=fp16", "train.steps=1", "optim.lr=1e-7")
    evidence = gather(run.path)
    assert evidence.facts.weights is not None
    gone = [t for t in evidence.facts.weights.tensors if t.formats["fp16"].below == 1]
    assert gone and all(tensor.name.endswith("bias") for tensor in gone)
    assert found(evidence) == []
    few = {"layer.weight": torch.ones(2), "layer.bias": torch.full((8,), 1e-9)}
    assert found(replace(of_tensors(tmp_path, few), recipe=evidence.recipe)) == []


def test_an_untouched_embedding_is_no_fault(tmp_path: Path) -> None:
    """Rows that no batch had have no gradient, no moments, and the weights of the beginning."""
    model = torch.nn.Sequential(torch.nn.Embedding(100, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    recorder = Recorder(model, optimizer, out=tmp_path / "run", every=5)
    for _ in range(25):
        with recorder.step(None):
            optimizer.zero_grad()
            model(torch.arange(3)).square().mean().backward()
            optimizer.step()
    recorder.close()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    assert found(gather(tmp_path / "run")) == []
    assert found(gather(folder)) == []


def test_a_checkpoint_with_nan_names_layers_and_the_newest_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LocalEngine.checkpoint

    def spoilt(engine: LocalEngine):  # type: ignore[no-untyped-def]
        tensors, state = save(engine)
        if state["attempted"] >= 8:
            tensors = tensors | {
                name: torch.full_like(tensors[name], torch.nan)
                for name in ("model.2.weight", "optimizer.momentum_buffer.2.weight")
            }
        return tensors, state

    monkeypatch.setattr(LocalEngine, "checkpoint", spoilt)
    settings = ("train.steps=12", "output={checkpoint_every: 4 steps, keep_last: 3}")
    run, plugin = training_run(tmp_path, "mlp", *settings)
    (bad,) = found(evidence_of(run, plugin))
    assert (bad.id, bad.layers, bad.step) == ("bad-checkpoint", ("2",), 12)
    assert bad.suggestion is not None
    assert "step-4" in bad.suggestion.what
    assert [(f.id, f.layers) for f in bad.consequences] == [("optimizer-state-corrupted", ("2",))]


def test_a_damaged_checkpoint_is_named_with_the_newest_good_one(tmp_path: Path) -> None:
    settings = ("train.steps=8", "output={checkpoint_every: 4 steps, keep_last: 2}")
    run, plugin = training_run(tmp_path, "mlp", *settings)
    newest = run.checkpoints_path / "step-8"
    tensors = max(newest.iterdir(), key=lambda file: file.stat().st_size)
    tensors.write_bytes(tensors.read_bytes()[:-1])
    (cause,) = found(evidence_of(run, plugin))
    assert cause.id == "bad-checkpoint"
    assert "checkpoints/step-8" in cause.cause
    assert cause.evidence["newest_good"] == "step-4"


MESSAGE = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.25 GiB of "
    "which 10.00 MiB is free."
)


def out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *settings: str
) -> tuple[Finding, RunDirectory]:
    accumulate = LocalEngine.accumulate

    def full(engine, *args, **options):  # type: ignore[no-untyped-def]
        if engine.scaler.attempted == 2:
            raise torch.OutOfMemoryError(MESSAGE)
        return accumulate(engine, *args, **options)

    monkeypatch.setattr(LocalEngine, "accumulate", full)
    monkeypatch.setattr("mpcli.launch.halved", lambda *_: None)  # begun again by nobody
    run, plugin = training_run(tmp_path, "mlp", *settings)
    (cause,) = found(evidence_of(run, plugin))
    return cause, run


def test_out_of_memory_says_what_is_needed_and_which_change_saves_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("train.global_batch_size=256", "train.micro_batch_size=128")
    cause, run = out_of_memory(tmp_path, monkeypatch, *more)
    assert (cause.id, cause.severity, cause.step) == ("out-of-memory", "error", 3)
    plan = run.plan()
    assert cause.evidence["weights_bytes"] == 4 * plan.parameters
    assert cause.evidence["optimizer_bytes"] == 4 * plan.parameters  # SGD's momentum
    assert cause.evidence["capacity_bytes"] == round(79.25 * 2**30)
    recipe = load_recipe(run.recipe_path, plugin=load_plugin(str(PLUGIN))).recipe
    half = halved(recipe, plan)
    assert half is not None
    now, then = needed(recipe, plan), needed(recipe, half)
    assert now is not None and then is not None
    assert cause.evidence["peak_bytes"] == now.peak
    changes = {c.set[0]: c for c in (cause.suggestion, *cause.alternatives) if c}
    said = changes["train.micro_batch_size=64"].what
    assert said.endswith(f"(saves about {size_text(now.peak - then.peak)})")
    assert "engine.activation_checkpointing=true" not in changes  # nothing to compute again


def test_where_the_need_is_not_known_no_number_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcli.diagnose.checks.memory.needed", lambda recipe, plan: None)
    cause, _ = out_of_memory(tmp_path, monkeypatch)
    assert "weights_bytes" not in cause.evidence
    assert cause.suggestion is not None
    assert cause.suggestion.set == ("train.micro_batch_size=8",)
    assert not any("saves" in c.what for c in (cause.suggestion, *cause.alternatives))
