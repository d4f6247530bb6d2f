"""Faults of training in real runs: each is found by its numbers, and sound runs have none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mpcli import Recorder
from mpcli.diagnose.checks.scale import skip_storm
from mpcli.diagnose.checks.training import TRAINING
from mpcli.diagnose.course import course_of
from mpcli.diagnose.evidence import NO_HISTORY, Evidence, History
from mpcli.diagnose.finding import Finding
from mpcli.diagnose.places import gather
from mpcli.diagnose.ranking import ranked
from tests.diagnose.training_runs import ADAM, trained

PURE_ADAM = "optim={kind: adamw, lr: 1e-4}"


def found(evidence: Evidence) -> list[Finding]:
    return ranked(finding for check in TRAINING for finding in check(evidence))


def ids(findings: list[Finding]) -> list[str]:
    return [finding.id for finding in findings if finding.severity != "info"]


SOUND = [
    ("mlp", ("precision.mode=fp16",)),
    ("conv", ("train.seed=1",)),
    ("residual", ("precision.mode=bf16-pure",)),
    ("transformer", (ADAM, "precision.mode=bf16")),
    ("mlp", ("optim={kind: adamw, lr: 0.1}",)),  # large updates that do no harm
]


@pytest.mark.parametrize(("model", "settings"), SOUND)
def test_sound_runs_have_no_finding(tmp_path: Path, model: str, settings: tuple[str, ...]) -> None:
    assert ids(found(trained(tmp_path, model, *settings))) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16", "bf16-master", "fp16-master"])
@pytest.mark.parametrize("model", ["mlp", "conv", "residual", "transformer"])
def test_sound_runs_of_every_model_and_mode(tmp_path: Path, model: str, mode: str) -> None:
    for name, optimizer in (("sgd", "optim.lr=0.1"), ("adam", ADAM)):
        (tmp_path / name).mkdir()
        settings = (optimizer, f"precision.mode={mode}", "train.seed=2")
        assert ids(found(trained(tmp_path / name, model, *settings, again=True))) == []


FAULTS = [
    ("mlp", ("optim.lr=10",), "learning-rate", "update", "6"),
    ("transformer", ("optim={kind: adamw, lr: 1}",), "learning-rate", "update", None),
    ("residual", ("optim.lr=1",), "learning-rate", "update", "3"),
    ("recurrent", ("task.gain=2",), "exploding-gradients", "backward", "step"),
    ("sigmoids", (), "vanishing-gradients", "backward", None),
    ("mlp", ("precision.mode=bf16-pure", PURE_ADAM), "lost-updates", "update", None),
    ("mlp", ("optim={kind: adamw, lr: 0.01, eps: 10}",), "adam-eps", "update", None),
    ("mlp", ("precision.mode=fp16-pure", ADAM), "adam-eps", "update", None),
]


@pytest.mark.parametrize(("model", "settings", "finding", "phase", "layer"), FAULTS)
def test_faults_are_the_first_cause(
    tmp_path: Path,
    model: str,
    settings: tuple[str, ...],
    finding: str,
    phase: str,
    layer: str | None,
) -> None:
    causes = found(trained(tmp_path, model, *settings))
    assert ids(causes) == [finding]
    assert causes[0].phase == phase
    assert layer is None or causes[0].layers[0] == layer
    assert causes[0].suggestion is not None


@pytest.mark.parametrize(
    ("model", "settings", "finding"),
    [
        ("mlp", ("optim.lr=10",), "learning-rate"),
        ("mlp", ("optim.lr=1e-5",), "learning-rate"),
        ("recurrent", ("task.gain=2",), "exploding-gradients"),
        ("mlp", ("precision.mode=bf16-pure", PURE_ADAM, "train.steps=60"), "lost-updates"),
        ("mlp", ("optim={kind: adamw, lr: 0.01, eps: 10}",), "adam-eps"),
    ],
)
def test_the_suggestion_mends_it(
    tmp_path: Path, model: str, settings: tuple[str, ...], finding: str
) -> None:
    for name in ("fault", "mended"):
        (tmp_path / name).mkdir()
    fault = trained(tmp_path / "fault", model, *settings)
    (cause,) = found(fault)
    assert cause.id == finding
    assert cause.suggestion is not None
    mended = trained(tmp_path / "mended", model, *settings, fix=cause.suggestion.set)
    assert finding not in ids(found(mended))
    before, after = (float(np.median(one.history.loss[-10:])) for one in (fault, mended))
    assert not after > before


def test_a_rate_that_is_too_low_is_none_of_precision(tmp_path: Path) -> None:
    (cause,) = found(trained(tmp_path, "mlp", "optim.lr=1e-5"))
    assert (cause.id, cause.severity) == ("learning-rate", "warning")
    assert "too low, in any precision" in cause.cause


def test_a_warm_up_that_is_not_over_is_not_a_low_rate(tmp_path: Path) -> None:
    evidence = trained(tmp_path, "mlp", "optim.lr=1e-5")
    rising = replace(evidence.history, lr=np.linspace(1e-7, 1e-5, len(evidence.history)))
    assert found(replace(evidence, history=rising)) == []


def test_clipping_that_leaves_nothing_is_what_to_change(tmp_path: Path) -> None:
    tiny = "train.clip={kind: norm, max_norm: 1e-6}"
    (cause,) = found(trained(tmp_path, "mlp", tiny))
    assert cause.suggestion is not None
    assert cause.suggestion.set[0].startswith("train.clip=")


def test_a_shadow_says_that_gradients_vanish_in_fp32_too(tmp_path: Path) -> None:
    half = "precision={mode: fp16, loss_scale: {kind: none}}"
    evidence = trained(tmp_path, "sigmoids", half, again=True)
    (cause,) = found(evidence)
    assert cause.id == "vanishing-gradients"
    assert cause.evidence["in_fp32_shadow"]
    assert cause.layers[0] == "0"


def test_random_numbers_of_another_generator(tmp_path: Path) -> None:
    causes = found(trained(tmp_path, "mlp", "task.draws=true", again=True))
    assert ids(causes) == ["nondeterminism"]
    assert causes[0].layers[0] == "3"


@pytest.mark.parametrize(
    ("recorded", "again", "steps_again", "told"),
    [
        (1.0, 1.0001, 0, False),  # another number of threads
        (1.0, 1.5, 0, True),
        (1.0, 1.5, 500, False),  # rounding has grown
        (float("nan"), 1.0, 500, True),
    ],
)
def test_a_loss_that_does_not_come_again(
    tmp_path: Path, recorded: float, again: float, steps_again: int, told: bool
) -> None:
    evidence = trained(tmp_path, "mlp", again=True)
    assert evidence.replay is not None
    other = {"recorded_loss": recorded, "loss": again, "steps_again": steps_again}
    replay = evidence.replay.model_copy(update={**other, "reproduced": False})
    assert ids(found(replace(evidence, replay=replay))) == (["nondeterminism"] if told else [])
    elsewhere = replay.model_copy(update={"flight_differs": ("batch",)})
    assert found(replace(evidence, replay=elsewhere)) == []


def test_norms_that_rise_by_decades_before_the_loss_does(tmp_path: Path) -> None:
    evidence = trained(tmp_path, "mlp", "probe.every=0")
    calm = evidence.history
    norm, loss = calm.grad_norm.copy(), np.full(len(calm), 1.4)
    norm[20:], loss[22:] = 1e4, 1e3
    (cause,) = found(replace(evidence, history=replace(calm, grad_norm=norm, loss=loss)))
    assert (cause.id, cause.step) == ("exploding-gradients", 21)
    assert cause.suggestion is not None
    assert cause.suggestion.set[0].startswith("train.clip=")
    falling = replace(calm, grad_norm=norm)  # a spike that does no harm
    assert found(replace(evidence, history=falling)) == []


@pytest.mark.parametrize(("spike", "begins"), [(22, 13), (10, 10)])
def test_skips_that_begin_after_the_growth_are_its_consequence(
    tmp_path: Path, spike: int, begins: int
) -> None:
    """The first norm that is not ordinary, or loss that spikes, is where it begins."""
    steps = np.arange(1, 41)
    norm, loss = np.ones(40), np.full(40, 1.4)
    norm[steps >= 13] = 5.0 if spike == 22 else 1.0
    norm[steps >= 21] = 1e4
    loss[steps >= spike] = 1e3
    applied = ~((steps >= 15) & (steps % 3 == 0))
    norm[~applied] = np.inf
    calm = trained(tmp_path, "mlp", "probe.every=0", "train.steps=40", "precision.mode=fp16")
    history = replace(calm.history, grad_norm=norm, loss=loss, applied=applied)
    evidence = replace(calm, history=history)
    checks = (skip_storm, *TRAINING)
    (cause,) = ranked(one for check in checks for one in check(evidence))
    assert (cause.id, cause.step) == ("exploding-gradients", begins)
    assert [(one.id, one.step) for one in cause.consequences] == [("skip-storm", 15)]


ONE_CYCLE = "optim={kind: sgd, lr: %s, momentum: 0.9, schedule: {kind: one-cycle, warmup: 0.25}}"


@pytest.mark.parametrize(("rate", "told"), [("3e-3", False), ("1e-6", True)])
def test_a_rate_is_judged_by_all_updates_and_not_by_those_of_a_warm_up(
    tmp_path: Path, rate: str, told: bool
) -> None:
    evidence = trained(tmp_path, "mlp", ONE_CYCLE % rate, "probe.every=1000")
    assert [sample.step for sample in evidence.samples] == [1]
    course = course_of(evidence.history)
    assert course and course.hardly_falls
    assert ids(found(evidence)) == (["learning-rate"] if told else [])
    assert evidence.recipe is not None
    task = evidence.recipe.task.model_copy(update={"init_from": tmp_path})
    tuned = evidence.recipe.model_copy(update={"task": task})
    assert found(replace(evidence, recipe=tuned)) == []


def test_an_adam_eps_that_fp16_needs_is_no_fault_where_it_learns(tmp_path: Path) -> None:
    settings = ("precision.mode=fp16-pure", "optim={kind: adamw, lr: 0.01, eps: 1e-4}")
    evidence = trained(tmp_path, "mlp", *settings)
    assert evidence.history.loss[-5:].mean() < 0.5 * evidence.history.loss[0]
    assert {one.severity for one in found(evidence)} <= {"info"}


def test_a_foreign_loop_gets_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=10.0)
    recorder = Recorder(model, optimizer, out=tmp_path / "run", every=10)
    for _ in range(30):
        inputs = torch.randn(16, 8)
        with recorder.step(inputs):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).backward()
            optimizer.step()
    recorder.close()
    (cause,) = found(gather(tmp_path / "run"))
    assert cause.id == "adam-eps"
    assert cause.suggestion is not None
    assert cause.suggestion.code == "eps=1e-08"
    assert cause.suggestion.set == ()


def test_missing_pieces_crash_nothing(tmp_path: Path) -> None:
    evidence = trained(tmp_path, "mlp", "optim.lr=10", again=True)
    nan = np.full(3, np.nan)
    broken = History(np.arange(1, 4), nan, nan, nan, nan, np.zeros(3, np.bool_))
    for history in (NO_HISTORY, broken, evidence.history):
        for changes in ({"samples": ()}, {"recipe": None, "plan": None}, {"replay": None}):
            found(replace(evidence, history=history, **changes))
