"""A suggestion is tried on the run's own steps: what helps is told from what does not."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import pytest

from mpcli import checkpoint
from mpcli.checkpoint import Checkpoint
from mpcli.diagnose.finding import Finding, FindingId, Severity, Suggestion
from mpcli.diagnose.rerun import State
from mpcli.diagnose.verify import verify
from mpcli.recipe.errors import Problem, UserError
from mpcli.recipe.plugin import PluginFile
from mpcli.recipe.recipe import Recipe
from mpcli.records import ForeignRun, Plan
from mpcli.rundir import RunDirectory
from tests.diagnose.faulty_runs import faulty_run

BF16 = Suggestion(what="bf16", set=("precision.mode=bf16", "precision.loss_scale={kind: none}"))
DYNAMIC = Suggestion(what="dynamic", set=("precision.loss_scale={kind: dynamic}",))
CODE = Suggestion(what="change the code", code="model.float()")


def fp32(*layers: str) -> Suggestion:
    names = ", ".join(f'"{layer}"' for layer in layers)
    return Suggestion(what="fp32 layers", set=(f"precision.sensitive_layers=[{names}]",))


def lr(value: float) -> Suggestion:
    return Suggestion(what="rate", set=(f"optim.lr={value}",))


def finding(
    name: FindingId,
    *suggestions: Suggestion,
    step: int | None = None,
    layers: tuple[str, ...] = (),
    severity: Severity = "error",
) -> Finding:
    first, *others = suggestions or (None,)
    return Finding(
        id=name,
        severity=severity,
        cause="by hand",
        phase="forward",
        step=step,
        layers=layers,
        confidence=1,
        evidence={},
        suggestion=first,
        alternatives=tuple(s for s in others if s),
    )


def verified(
    run: RunDirectory, *found: Finding, steps: int = 4, plugin: PluginFile | None = None
) -> tuple[list[Finding], list[str]]:
    """The findings, and what was told."""
    told: list[str] = []
    run = RunDirectory.read(run.path)
    return verify(run, found, steps=steps, plugin=plugin, tell=told.append), told


def contents(run: RunDirectory) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(run.path)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in run.path.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, PluginFile, int]:
    """A run whose layer `2` overflows in fp16 where the marked sample is, and that step."""
    run, plugin = faulty_run(
        tmp_path_factory.mktemp("overflow"), "mlp", "2", "forward-overflow", "train.steps=12"
    )
    broken = [row.step for row in run.steps() if not row.applied]
    return run, plugin, broken[0]


def test_a_layer_that_overflows_is_mended_in_fp32(
    overflowing: tuple[RunDirectory, PluginFile, int],
) -> None:
    run, plugin, step = overflowing
    before = contents(run)
    (found,), told = verified(
        run, finding("forward-overflow", fp32("2"), BF16, step=step), plugin=plugin
    )
    assert contents(run) == before
    assert found.verified is True and found.suggestion == fp32("2")
    assert found.alternatives == (BF16,)
    (trial,) = found.tried
    assert trial.fixed and trial.checkpoint is None
    assert trial.with_it is not None
    assert trial.without.steps == trial.with_it.steps == min(step + 4, 12)
    assert trial.without.symptom >= 1 and trial.without.skipped >= 1
    assert (trial.with_it.symptom, trial.with_it.skipped) == (0, 0)
    assert math.isfinite(trial.with_it.loss)
    assert 0 < trial.without.seconds_per_step < 5 and 0 < trial.with_it.seconds_per_step < 5
    assert 0 < trial.with_it.peak_memory_bytes < 2**20
    assert any(text.startswith("as the run was: steps 1 to") for text in told)
    assert any(text.startswith("it helps: ") for text in told)


def test_after_a_wrong_suggestion_the_next_is_tried(
    overflowing: tuple[RunDirectory, PluginFile, int],
) -> None:
    run, plugin, step = overflowing
    wrong, refused = fp32("0"), fp32("nowhere")
    asked = finding("forward-overflow", CODE, wrong, refused, BF16, step=step)
    (found,), told = verified(run, asked, plugin=plugin)
    assert found.verified is True and found.suggestion == BF16
    assert found.alternatives == (CODE,)
    assert [trial.suggestion for trial in found.tried] == [wrong, refused, BF16]
    assert [trial.fixed for trial in found.tried] == [False, False, True]
    assert found.tried[1].with_it is None and "nowhere" in found.tried[1].why
    assert sum("as the run was" in text for text in told) == 1


def test_suggestions_that_do_not_help_say_so(
    overflowing: tuple[RunDirectory, PluginFile, int],
) -> None:
    run, plugin, step = overflowing
    wrong = [fp32("0"), lr(0.001), DYNAMIC]
    asked = finding("forward-overflow", *wrong, BF16, step=step)  # the fourth is not tried
    (found,), told = verified(run, asked, plugin=plugin)
    assert found.verified is False
    assert found.suggestion == wrong[0] and found.alternatives == (*wrong[1:], BF16)
    assert [trial.suggestion for trial in found.tried] == wrong
    assert sum(text.startswith("it does not help: ") for text in told) == 3


def test_findings_of_one_window_share_the_steps_without(
    overflowing: tuple[RunDirectory, PluginFile, int],
) -> None:
    run, plugin, step = overflowing
    one = finding("forward-overflow", fp32("2"), step=step)
    given = [
        finding("bad-checkpoint", BF16),
        finding("missing-unscale", CODE),
        finding("fp32-island", BF16, severity="info"),
        one,
        finding("batchnorm-stats", BF16, step=step),
        one,
    ]
    found, told = verified(run, *given, plugin=plugin)
    assert [f.verified for f in found] == [None, None, None, True, True, None]
    assert found[1:3] == given[1:3]
    assert found[0].not_tried and found[5].not_tried
    assert "first 3" in found[5].not_tried
    assert sum("as the run was" in text for text in told) == 1


def test_what_the_steps_do_not_show_is_not_tried(
    overflowing: tuple[RunDirectory, PluginFile, int],
) -> None:
    run, plugin, step = overflowing
    (found,), _ = verified(run, finding("lost-updates", BF16, step=step), plugin=plugin)
    assert found.verified is None and not found.tried
    assert found.not_tried and "do not show it" in found.not_tried


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, PluginFile]:
    """12 steps of a sound model under far too low a scale, with a checkpoint after each fourth."""
    return faulty_run(
        *(tmp_path_factory.mktemp("saved"), "mlp", "0", "none", "train.steps=12"),
        "precision.loss_scale.scale=1e-5",
        "output={checkpoint_every: 4 steps, keep_last: 3}",
    )


def test_a_scale_that_is_too_low_is_mended_by_a_dynamic_one(
    saved: tuple[RunDirectory, PluginFile],
) -> None:
    run, plugin = saved
    before = contents(run)
    (found,), told = verified(run, finding("underflow", DYNAMIC, step=5), plugin=plugin)
    assert contents(run) == before
    (trial,) = found.tried
    assert found.verified is True, trial.why
    assert trial.checkpoint == 4 and "steps 5 to 9 from step-4" in told[0]
    assert trial.with_it and trial.with_it.symptom < 0.1 < trial.without.symptom


@pytest.mark.parametrize(
    ("name", "step", "steps", "start", "end"),
    [
        ("underflow", 5, 4, 4, 9),
        ("underflow", 4, 4, 0, 8),
        ("underflow", 10, 2, 8, 12),
        ("underflow", 10, 6, 4, 12),  # from where six steps can follow
        ("underflow", None, 4, 8, 12),
        ("underflow", None, 99, 0, 12),
        ("underflow", 99, 4, 8, 12),
        ("adam-eps", 9, 1, 0, 10),  # whose state is no longer sound
    ],
)
def test_the_steps_begin_before_the_symptom_and_reach_it(
    saved: tuple[RunDirectory, PluginFile],
    monkeypatch: pytest.MonkeyPatch,
    name: FindingId,
    step: int | None,
    steps: int,
    start: int,
    end: int,
) -> None:
    def seen(recipe: Recipe, plan: Plan, state: State, last: int, tell: object) -> None:
        assert (state.tensors is None) == (state.attempted == 0)
        raise UserError(Problem(f"from {state.attempted} to {last}"))

    monkeypatch.setattr("mpcli.diagnose.verify.run_steps", seen)
    run, plugin = saved
    (found,), _ = verified(run, finding(name, DYNAMIC, step=step), steps=steps, plugin=plugin)
    assert found.not_tried == f"its steps cannot be run again: from {start} to {end}"


def test_checkpoints_that_are_not_sound_are_passed_over(
    saved: tuple[RunDirectory, PluginFile], tmp_path: Path
) -> None:
    original, plugin = saved
    run = RunDirectory.read(shutil.copytree(original.path, tmp_path / "copy"))
    eighth, fourth = (Checkpoint(run.checkpoints_path / f"step-{n}", n) for n in (8, 4))
    tensors, state = checkpoint.load(eighth)
    tensors["model.0.weight"][0, 0] = math.nan
    checkpoint.save(run.checkpoints_path, 8, tensors, state, keep_last=9)
    with (fourth.path / "state.json").open("a") as file:
        file.write(" ")
    (found,), told = verified(run, finding("underflow", DYNAMIC, step=9), steps=1, plugin=plugin)
    assert found.tried[0].checkpoint is None
    assert "step-4 is passed over: it is not whole" in told
    assert "step-8 is passed over: it is not finite" in told


def test_a_state_too_far_from_the_symptom_is_not_gone_on_from(
    saved: tuple[RunDirectory, PluginFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plugin = saved
    monkeypatch.setattr("mpcli.diagnose.verify.REACH", 2)
    asked = [finding("underflow", DYNAMIC, step=step) for step in (4, 10)]
    (far, near), _ = verified(run, *asked, steps=2, plugin=plugin)
    assert far.verified is None and far.not_tried and "6 steps" in far.not_tried
    assert near.verified is True


def test_a_rate_that_is_too_high_is_mended_by_a_lower_one(tmp_path: Path) -> None:
    run, plugin = faulty_run(
        *(tmp_path, "mlp", "0", "none", "precision={mode: fp32}", "optim.lr=30"),
        "train.steps=24",
    )
    asked = finding("learning-rate", lr(100), lr(0.1), step=3)
    (found,), _ = verified(run, asked, steps=16, plugin=plugin)
    assert [trial.fixed for trial in found.tried] == [False, True]
    assert found.suggestion == lr(0.1) and found.alternatives == ()
    assert found.tried[1].symptom == "loss"


def test_lost_updates_are_found_again_with_masters(tmp_path: Path) -> None:
    run, plugin = faulty_run(
        *(tmp_path, "mlp", "0", "none", "precision={mode: bf16-pure}", "optim.lr=1e-4"),
        *("output={checkpoint_every: 2 steps, keep_last: 9}", "train.steps=8"),
    )
    masters = Suggestion(what="masters", set=("precision.mode=bf16-master",))
    (found,), _ = verified(run, finding("lost-updates", masters, step=3), plugin=plugin)
    (trial,) = found.tried
    assert found.verified is True and trial.checkpoint == 2, trial.why
    assert trial.with_it and trial.with_it.symptom < 0.1 and trial.without.symptom > 0.5


def test_outputs_are_compared_with_fp32_where_nothing_breaks(tmp_path: Path) -> None:
    run, plugin = faulty_run(tmp_path, "conv", "1", "none", "precision.mode=bf16-pure")
    asked = finding("norm-in-half", fp32("norm"), layers=("3",))
    (found,), _ = verified(run, asked, plugin=plugin)
    (trial,) = found.tried
    assert trial.symptom == "relative difference of outputs from fp32"
    assert trial.with_it and 0 < trial.with_it.symptom < trial.without.symptom < 0.1


def test_without_the_plan_findings_are_told_all_the_same(
    saved: tuple[RunDirectory, PluginFile], tmp_path: Path
) -> None:
    original, plugin = saved
    run = RunDirectory.read(shutil.copytree(original.path, tmp_path / "copy"))
    (run.attempt_path / "plan.json").unlink()
    asked = finding("underflow", DYNAMIC, step=9)
    (found,), told = verified(run, asked, plugin=plugin)
    assert found.verified is None and found.suggestion == asked.suggestion
    assert found.not_tried and "plan of attempt 1 cannot be read" in found.not_tried
    assert any("no suggestion is tried" in text for text in told)


def test_a_run_of_another_loop_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.create_foreign(
        ForeignRun(loop="pytorch", model="M", parameters=1, optimizer="SGD", scaler=None, every=1),
        {},
        tmp_path / "other",
    )
    run.close()
    with pytest.raises(UserError) as error:
        verify(run, [])
    assert error.value.exit_code == 2
