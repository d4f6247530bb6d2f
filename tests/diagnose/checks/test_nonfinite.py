"""What makes the first NaN or infinity is named, and other things are not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from mpcli.diagnose.checks.nonfinite import NONFINITE
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.facts import Facts, RunFacts
from mpcli.diagnose.finding import Finding
from mpcli.diagnose.places import gather
from tests.diagnose.checks.numeric_runs import causes, evidence_of, foreign_run, odd_run

PURE = "precision.mode=fp16-pure"


def said(evidence: Evidence) -> list[Finding]:
    return [finding for check in NONFINITE for finding in check(evidence)]


@pytest.mark.parametrize(
    ("layer", "overrides", "expected", "first"),
    [
        ("overflow", (), ("forward-overflow", "forward"), "precision.sensitive_layers="),
        # Its output would be cast to fp16 behind an fp32 layer.
        ("residual", (), ("forward-overflow", "forward"), "precision.mode=bf16"),
        ("attention", (), ("attention-logits", "forward"), "precision.sensitive_layers="),
        ("sum", (PURE,), ("half-reduction", "forward"), "precision.sensitive_layers="),
        ("softmax", (PURE,), ("norm-in-half", "forward"), "precision.sensitive_layers=[Written]"),
        ("root", (), ("backward-nonfinite", "backward"), None),
        ("log", (), ("scale-collapse", "forward"), None),
    ],
)
def test_the_cause_is_named_with_its_layer_phase_and_fix(
    tmp_path: Path,
    layer: str,
    overrides: tuple[str, ...],
    expected: tuple[str, str],
    first: str | None,
) -> None:
    run, plugin = odd_run(tmp_path, layer, "train.steps=20", *overrides)
    (cause,) = causes(evidence_of(run, plugin))
    assert (cause.id, cause.phase) == expected
    assert (cause.layers, cause.severity, cause.step) == (("2",), "error", 1)
    follows = "forward-nonfinite" if cause.id == "scale-collapse" else "scale-collapse"
    assert [found.id for found in cause.consequences] == [follows]
    assert cause.suggestion
    if first:
        assert cause.suggestion.set[0].startswith(first)
        assert cause.evidence["also in fp32"] is False
    else:  # no setting of a recipe mends an operation
        assert not cause.suggestion.set and cause.suggestion.code
        assert not cause.alternatives and cause.evidence["also in fp32"] is True


def test_an_overflow_in_a_scalar_of_the_loss_is_of_its_sum(tmp_path: Path) -> None:
    run, plugin = odd_run(tmp_path, "none", "train.steps=6", "task.squares=1e4", PURE)
    evidence = evidence_of(run, plugin)
    assert evidence.replay and evidence.replay.origin and evidence.replay.origin.elements == 1
    (cause,) = causes(evidence)
    assert (cause.id, cause.layers, cause.phase) == ("half-reduction", ("loss",), "forward")


def test_a_cast_that_overflows_is_the_fault_of_who_returned_such_numbers(tmp_path: Path) -> None:
    evidence = evidence_of(*odd_run(tmp_path, "wide", "train.steps=6"))
    assert evidence.replay and evidence.replay.origin
    assert (evidence.replay.origin.module, evidence.replay.origin.operation) == ("3", "_to_copy")
    (cause,) = causes(evidence)
    assert (cause.id, cause.layers, cause.phase) == ("forward-overflow", ("2",), "forward")


@pytest.mark.parametrize(
    ("batch", "words"),
    [("nan", "itself holds nan"), ("huge", "`inputs` of the batch of step 2 has values up to")],
)
def test_a_bad_batch_is_the_inputs_fault(tmp_path: Path, batch: str, words: str) -> None:
    run, plugin = odd_run(tmp_path, "none", f"task.batch={batch}", "train.on_nonfinite=stop")
    (cause,) = causes(evidence_of(run, plugin))
    assert (cause.id, cause.phase, cause.step) == ("bad-batch", "input", 2)
    assert words in cause.cause
    assert cause.suggestion and cause.suggestion.set == ("train.on_nonfinite=skip",)


def test_a_label_that_the_model_has_no_number_for_is_told(tmp_path: Path) -> None:
    run, _ = odd_run(tmp_path, "none", "task.batch=label")
    (cause,) = causes(gather(run.path))
    assert (cause.id, cause.phase, cause.step) == ("bad-batch", "input", 2)
    assert cause.evidence["message"] == "Target 3 is out of bounds"


def test_without_a_replay_less_is_said_with_less_confidence(tmp_path: Path) -> None:
    run, _ = odd_run(tmp_path, "overflow", "train.steps=6")
    (cause,) = causes(gather(run.path))  # its first step was sampled
    assert (cause.id, cause.layers) == ("forward-overflow", ("2",))
    assert cause.confidence < 0.5
    unsampled = replace(gather(run.path), samples=())
    (cause,) = causes(unsampled)
    assert (cause.id, cause.layers, cause.step) == ("forward-overflow", (), 1)
    assert cause.confidence <= 0.3


@pytest.mark.parametrize(
    ("layer", "options", "expected"),
    [
        ("overflow", {}, ("forward-overflow", ("2",), "forward", 1)),
        ("overflow", {"scaled": False}, ("forward-overflow", ("2",), "forward", 1)),
        ("root", {}, ("backward-nonfinite", ("2",), "backward", 1)),
        ("root", {"half": False, "scaled": False}, ("backward-nonfinite", ("2",), "backward", 1)),
        ("log", {}, ("scale-collapse", ("2",), "forward", 1)),
        ("none", {"bad": math.nan}, ("bad-batch", (), "input", 6)),
        ("none", {"bad": 1e9}, ("bad-batch", (), "input", 6)),
    ],
)
def test_a_loop_that_is_not_ours_is_judged_by_what_its_recorder_found(
    tmp_path: Path,
    layer: str,
    options: dict[str, object],
    expected: tuple[str, tuple[str, ...], str, int],
) -> None:
    (cause,) = causes(foreign_run(tmp_path / "run", layer, **options))  # type: ignore[arg-type]
    assert (cause.id, cause.layers, cause.phase, cause.step) == expected
    assert cause.suggestion and cause.suggestion.code
    # One bad batch that was skipped did no harm.
    assert cause.severity == ("warning" if layer == "none" else "error")


def test_nothing_is_said_of_places_without_numbers() -> None:
    assert said(Evidence(Facts(path="x", kind="file"))) == []
    empty = RunFacts(
        foreign=None, result=None, steps=0, skipped=0, nonfinite_losses=0, first_nonfinite=None,
        last=(), sampled=(), flights=(), events=(), types={}, unread={},
    )  # fmt: skip
    assert said(Evidence(Facts(path="x", kind="run", run=empty))) == []
