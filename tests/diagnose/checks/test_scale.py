"""Loss scales that are wrong, and those that merely look for their level."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpcli.diagnose.checks.scale import SCALE
from mpcli.diagnose.evidence import NO_HISTORY, Evidence, History
from mpcli.diagnose.facts import Facts
from mpcli.diagnose.finding import Finding
from mpcli.recipe.load import load_recipe
from mpcli.recipe.recipe import Recipe
from tests.diagnose.checks.numeric_runs import causes, evidence_of, foreign_run, odd_run
from tests.diagnose.faulty_runs import faulty_run
from tests.small import small_recipe


def said(evidence: Evidence) -> list[Finding]:
    return [finding for check in SCALE for finding in check(evidence)]


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return small_recipe(folder, "precision.mode=fp16", *overrides).recipe


def history(scales: list[float], skipped: set[int], losses: float = 1.0) -> History:
    """Steps from 1 on."""
    number = len(scales)
    return replace(
        NO_HISTORY,
        step=np.arange(1, number + 1),
        loss=np.full(number, losses),
        lr=np.full(number, 0.1),
        grad_norm=np.ones(number),
        scale=np.array(scales, np.float64),
        applied=np.array([step not in skipped for step in range(1, number + 1)]),
    )


def recorded(steps: History, recipe: Recipe | None = None) -> Evidence:
    return Evidence(Facts(path="x", kind="run"), recipe=recipe, history=steps)


def test_gradients_that_a_scale_loses_are_found_and_raised(tmp_path: Path) -> None:
    run, plugin = odd_run(tmp_path, "none", "task.loss=1e-7", "precision.loss_scale={kind: none}")
    evidence = evidence_of(run, plugin)
    (cause,) = causes(evidence)
    assert (cause.id, cause.severity, cause.phase, cause.step) == (
        "underflow", "error", "backward", 1,
    )  # fmt: skip
    assert set(cause.layers) == {"0", "3", "4"}
    assert cause.evidence["share that becomes zero"] == 1
    assert cause.suggestion and cause.suggestion.set == ("precision.loss_scale={kind: dynamic}",)
    # 2^(floor(log2(65504 / max)) - 1), at most 2^24
    assert "scale: 16777216" in cause.alternatives[0].set[0]
    (cause,) = causes(replace(evidence, replay=None))
    assert cause.id == "underflow" and cause.confidence < 0.7


def test_where_the_range_of_fp16_does_not_do_no_scale_is_suggested(tmp_path: Path) -> None:
    run, plugin = odd_run(tmp_path, "shrink", "train.steps=10")
    (cause,) = causes(evidence_of(run, plugin))
    assert (cause.id, cause.layers) == ("underflow", ("0",))
    assert "no room for a higher scale" in cause.cause
    assert cause.suggestion and cause.suggestion.set[0] == "precision.mode=bf16"


@pytest.mark.parametrize(("end", "told"), [(0.005, []), (0.05, ["underflow"])])
def test_gradients_that_end_with_the_loss_are_no_underflow(
    tmp_path: Path, end: float, told: list[str]
) -> None:
    run, plugin = odd_run(tmp_path, "none", "task.loss=1e-7", "precision.loss_scale={kind: none}")
    evidence = evidence_of(run, plugin)
    falling = replace(evidence.history, loss=np.geomspace(1.0, end**1.2, len(evidence.history)))
    assert [found.id for found in said(replace(evidence, history=falling))] == told


@pytest.mark.parametrize("mode", ["bf16", "fp32"])
def test_there_is_no_underflow_in_a_format_with_the_range_of_fp32(
    tmp_path: Path, mode: str
) -> None:
    overrides = (f"precision.mode={mode}", "task.loss=1e-7", "train.steps=10")
    run, plugin = odd_run(tmp_path, "none", *overrides)
    assert causes(evidence_of(run, plugin)) == []


@pytest.mark.parametrize(
    ("scale", "first"),
    [
        ("{kind: static, scale: 16777216}", "precision.loss_scale={kind: dynamic}"),
        (
            "{kind: dynamic, init_scale: 16777216, min_scale: 4194304}",
            "precision.loss_scale={kind: dynamic, init_scale: 65536, min_scale: 1}",
        ),
    ],
)
def test_a_scale_that_is_too_high_and_does_not_fall_is_told(
    tmp_path: Path, scale: str, first: str
) -> None:
    run, plugin = odd_run(tmp_path, "none", f"precision.loss_scale={scale}", "train.steps=20")
    evidence = evidence_of(run, plugin)
    for seen, confidence in ((evidence, 1.0), (replace(evidence, replay=None), 0.7)):
        (cause,) = causes(seen)
        assert (cause.id, cause.phase, cause.step) == ("scale-too-high", "backward", 1)
        assert cause.layers in (("loss",), ("4",))  # where the loss meets fp16
        assert cause.confidence == confidence
        assert cause.suggestion and cause.suggestion.set == (first,)
    load_recipe(run.recipe_path, cause.suggestion.set, plugin)  # it is a recipe


def test_a_layer_that_amplifies_inside_is_told_from_a_scale(tmp_path: Path) -> None:
    overrides = ("precision.loss_scale={kind: static, scale: 256}", "train.steps=10")
    run, plugin = odd_run(tmp_path, "amplify", *overrides)
    (cause,) = causes(evidence_of(run, plugin))
    assert (cause.id, cause.layers, cause.phase) == ("backward-nonfinite", ("2",), "backward")
    assert cause.suggestion and "sensitive_layers" in cause.suggestion.set[0]


def test_a_scale_that_grows_too_soon_is_a_storm(tmp_path: Path) -> None:
    scale = "{kind: dynamic, growth_interval: 1, init_scale: 1048576}"
    run, plugin = odd_run(tmp_path, "none", f"precision.loss_scale={scale}")
    (cause,) = causes(evidence_of(run, plugin))
    assert cause.id == "skip-storm" and cause.layers == ()
    assert cause.evidence["share of steps skipped"] == pytest.approx(0.5, abs=0.05)
    assert cause.suggestion and "growth_interval: 2000" in cause.suggestion.set[0]


def test_a_scale_that_falls_to_its_level_is_healthy(tmp_path: Path) -> None:
    scale = "{kind: dynamic, init_scale: 16777216}"
    run, plugin = odd_run(tmp_path, "none", f"precision.loss_scale={scale}")
    evidence = evidence_of(run, plugin)
    assert evidence.history.skipped.sum() >= 5
    assert causes(evidence) == causes(replace(evidence, replay=None)) == []


def test_a_skip_that_a_growth_leads_to_is_healthy(tmp_path: Path) -> None:
    steps = history([2.0**16] * 100 + [2.0**17] + [2.0**16] * 50, {101})
    for recipe in (recipe_of(tmp_path), None):
        assert said(recorded(steps, recipe)) == []
        last = history([2.0**16] * 100 + [2.0**17], {101})
        assert said(recorded(last, recipe)) == []


def test_a_scale_that_collapses_is_not_raised(tmp_path: Path) -> None:
    scales = [2.0 ** max(16 - step, 0) for step in range(30)]
    steps = history(scales, set(range(1, 31)))
    for recipe in (recipe_of(tmp_path), None):
        found = {finding.id: finding for finding in said(recorded(steps, recipe))}
        collapse = found.pop("scale-collapse")
        assert collapse.step == 17 and "a higher scale would make it worse" in collapse.cause
        assert collapse.suggestion and "bf16" in collapse.suggestion.what
        assert "scale-too-high" not in found


def test_a_low_scale_that_was_asked_for_has_not_collapsed(tmp_path: Path) -> None:
    scale = "precision.loss_scale={kind: static, scale: 0.5}"
    assert said(recorded(history([0.5] * 30, {3}), recipe_of(tmp_path, scale))) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scaler": {"init_scale": 2.0**24, "backoff_factor": 1 - 1e-9}}, "scale-too-high"),
        ({"scaler": {"init_scale": 2.0**20, "growth_interval": 1}}, "skip-storm"),
        ({"scaled": False, "loss": 1e-7}, "underflow"),
        ({"scaler": {"init_scale": 2.0**24}}, None),
        # In fp32 nothing is lost, but such a loss moves nothing.
        ({"scaled": False, "half": False, "loss": 1e-7}, "learning-rate"),
    ],
)
def test_a_loop_that_is_not_ours_is_judged_by_its_rows(
    tmp_path: Path, options: dict[str, object], expected: str | None
) -> None:
    found = causes(foreign_run(tmp_path / "run", "none", **options))  # type: ignore[arg-type]
    assert [cause.id for cause in found] == ([expected] if expected else [])
    assert all(cause.suggestion and cause.suggestion.code for cause in found)


@pytest.mark.parametrize("mode", ["fp16", "fp16-pure", "bf16", "fp32"])
@pytest.mark.parametrize("model", ["mlp", "conv", "transformer", "residual"])
@pytest.mark.slow
def test_healthy_runs_have_no_findings(tmp_path: Path, model: str, mode: str) -> None:
    kind = "dynamic" if mode.startswith("fp16") else "none"
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        run, plugin = faulty_run(
            folder, model, "loss", "none", f"precision.mode={mode}", f"train.seed={seed}",
            f"precision.loss_scale={{kind: {kind}}}", "train.on_nonfinite=skip", "train.steps=20",
        )  # fmt: skip
        evidence = evidence_of(run, plugin)
        assert causes(evidence) == causes(replace(evidence, replay=None)) == []


def test_nothing_is_said_of_places_without_numbers() -> None:
    assert said(Evidence(Facts(path="x", kind="file"))) == []
    assert said(recorded(NO_HISTORY)) == []
    nothing = history([float("nan")] * 30, set(range(1, 31)), float("nan"))
    assert [found.id for found in said(recorded(nothing))] in ([], ["skip-storm"])
