"""What is recommended, from made-up trials."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mpcli.recipe.load import load_recipe
from mpcli.records import Status
from mpcli.sweep.recommendation import LossScaleSweep
from mpcli.sweep.results import (
    Fractions,
    GradientError,
    GradientHistogram,
    LayerFractions,
    TrialResult,
)
from tests.small import RECIPE


def trial(label: str, *settings: str, seed: int = 0, loss: float | None = 1.0, **about: Any) -> Any:
    """A run that learnt: its loss fell from 3."""
    fields: dict[str, Any] = {
        "status": "done",
        "steps": 100,
        "skipped": 0,
        "first_loss": 3.0,
        "metrics": {},
        "seconds_per_step": 0.1,
        "peak_memory_bytes": 1,
        **about,
    }
    run = f"{label}-seed{seed}"
    return TrialResult(label=label, seed=seed, settings=settings, run=run, loss=loss, **fields)


def at(scale: float, **about: Any) -> Any:
    setting = f"precision.loss_scale={{kind: static, scale: {scale:g}}}"
    return trial(f"scale={scale:g}", setting, **about)


def gradient(lowest: int, *counts: int, name: str = "layer", largest: float | None = None) -> Any:
    most = 1.5 * 2.0 ** (lowest + len(counts) - 1)
    return GradientHistogram(
        module=name,
        tensor="grad_output",
        name=name,
        elements=sum(counts),
        max=most if largest is None else largest,
        zeros=0.0,
        lowest=lowest,
        counts=counts,
    )


def reference(*histograms: Any, seed: int = 0, **about: Any) -> Any:
    return trial("fp32", seed=seed, histograms=histograms, **about)


SMALL = gradient(-30, *[100] * 20)
"""From 2^-30 to 2^-10: the knee is 32, the top 2^26."""


def recommended(*trials: Any) -> dict[str, Any]:
    return LossScaleSweep(trials).recommended()


def test_a_dynamic_scale_begins_two_bits_below_the_top() -> None:
    found = recommended(reference(gradient(-30, *[100] * 30)), at(1024))
    assert (found["policy"], found["knee"], found["window"]) == ("dynamic", 32.0, [32.0, 2.0**16])
    assert (found["init_scale"], found["window_bits"]) == (2.0**14, 11.0)
    setting = "{kind: dynamic, init_scale: 16384, min_scale: 1, max_scale: 16777216}"
    assert found["set"] == f"precision.loss_scale={setting}"
    assert not found["confirmed"]


def test_it_begins_at_the_knee_where_there_is_no_room_and_within_the_policys_bounds() -> None:
    narrow = recommended(reference(gradient(-30, *[100] * 41)))
    assert (narrow["window"], narrow["init_scale"]) == ([32.0, 32.0], 32.0)
    assert recommended(reference(SMALL))["init_scale"] == 2.0**24
    tiny = recommended(reference(gradient(-55, 100, 100)))
    assert (tiny["knee"], tiny["init_scale"]) == (2.0**30, 2.0**30)
    assert "max_scale: 1073741824" in tiny["set"]
    large = recommended(reference(gradient(18, 100, 100)))
    assert (large["window"], large["init_scale"]) == (None, 0.0625)
    assert "min_scale: 0.0625" in large["set"]
    assert "unreliable" in large["why"]


@pytest.mark.parametrize("own", ["", "min_scale: 1024, max_scale: 32768, init_scale: 2048"])
@pytest.mark.parametrize(
    "histogram",
    [
        SMALL,
        gradient(-55, 100, 100),
        gradient(18, 100),
        gradient(-20, 100),
        gradient(-30, *[1] * 41),
    ],
)
def test_what_is_recommended_is_a_recipe(histogram: Any, own: str, tmp_path: Any) -> None:
    path = tmp_path / "recipe.yaml"
    given = f", loss_scale: {{kind: dynamic, {own}}}" if own else ""
    path.write_text(RECIPE.replace("mode: fp32", f"mode: fp16{given}"))
    found = recommended(reference(histogram))
    scale = load_recipe(path, [found["set"]]).recipe.precision.loss_scale
    assert scale.kind == found["policy"]
    if scale.kind == "dynamic":
        assert scale.init_scale == found["init_scale"]


def test_its_own_run_confirms_it() -> None:
    before = recommended(reference(SMALL))
    after = recommended(reference(SMALL), trial("recommended", before["set"], loss=1.05))
    assert after == {**before, "confirmed": True}
    bad = recommended(reference(SMALL), trial("recommended", before["set"], loss=1.5))
    assert not bad["confirmed"]
    assert "did not end where fp32 did" in bad["why"]


def test_a_fixed_scale_where_only_that_was_seen_to_work() -> None:
    failed = trial("recommended", recommended(reference(SMALL))["set"], loss=2.9)
    others = [at(1024), at(2.0**16), at(8), at(2.0**27)]  # which is nearer, but above the top
    found = recommended(reference(SMALL), failed, *others)
    assert (found["policy"], found["init_scale"]) == ("static", 2.0**16)
    assert found["set"] == "precision.loss_scale={kind: static, scale: 65536}"
    assert found["confirmed"]


def test_no_scaling_is_needed_where_nothing_is_lost_without() -> None:
    plain = gradient(-20, *[100] * 20)
    found = recommended(reference(plain), at(1.0))
    assert (found["policy"], found["confirmed"]) == ("none", True)
    assert found["set"] == "precision.loss_scale={kind: none}"
    assert found["why"].startswith("No scaling needed")
    assert not recommended(reference(plain), at(256))["confirmed"]
    assert recommended(reference(plain), at(1.0, loss=2.0))["policy"] == "dynamic"


def test_an_overflow_in_forward_is_no_matter_of_the_scale() -> None:
    exact = reference(SMALL, outputs_max={"layer": 2e5, "head": 3.0, "norm": 1e9})
    failed = {"loss": None, "status": "diverged", "skipped": 100}
    found = recommended(exact, at(1, **failed), at(1024, **failed))
    assert (found["policy"], found["set"]) == (None, None)
    assert "`layer` (2e+05) overflows in forward" in found["why"]
    assert "set 'precision.sensitive_layers" not in found["why"]  # its outputs would overflow again
    assert "norm" not in found["why"]  # which fp16 does not hold
    assert recommended(exact, at(1024))["policy"] == "dynamic"  # the runs say otherwise


def test_a_loss_that_is_nan_at_every_scale_is_an_overflow_in_forward() -> None:
    gone = {"loss": math.nan, "first_loss": math.nan, "status": "diverged", "skipped": 10}
    found = recommended(reference(SMALL), at(1, **gone), at(1024, **gone), trial("dynamic", **gone))
    assert (found["policy"], found["window"]) == (None, None)
    assert found["why"].startswith("No scale works here: in every run in fp16 the loss itself")
    some = recommended(reference(SMALL), at(64), at(1024, **gone))
    assert some["window"] == [32.0, 2.0**26]  # what is NaN in forward is not the scale's doing


def test_runs_that_trained_nothing_say_nothing() -> None:
    failed = {"status": "failed", "reason": "out of memory", "steps": 0, "first_loss": None}
    none = [at(1, loss=None, **failed), at(1024, loss=None, **failed)]
    found = recommended(reference(SMALL, outputs_max={"layer": 2e5}), *none)
    assert (found["policy"], found["set"], found["window"]) == (None, None, None)
    assert found["why"] == "No run in fp16 trained: out of memory."
    gone = at(64, loss=math.nan, first_loss=math.nan, status="diverged", skipped=10)
    assert "is NaN or infinite in forward" in recommended(reference(SMALL), gone, *none)["why"]
    # Nor is a scale clean at which nothing was tried.
    tried = [at(16), at(256, skipped=1), none[1]]
    assert recommended(reference(SMALL), *tried)["window"] == [32.0, 128.0]


def test_a_loss_that_becomes_nan_later_is_no_overflow_in_forward() -> None:
    late = {"loss": math.nan, "status": "diverged", "skipped": 10}
    found = recommended(reference(SMALL), at(1, **late), at(1024, **late))
    assert (found["policy"], found["set"]) == (None, None)
    assert "forward" not in found["why"]
    assert "the loss became NaN" in found["why"]
    assert "`mptrain diagnose`" in found["why"] and "`trials/scale=1-seed0`" in found["why"]


def test_below_a_scale_of_1_only_runs_count() -> None:
    exact = reference(gradient(-12, 100, 100))
    assert recommended(exact)["window"][0] == 1.0
    assert recommended(exact, at(0.25, loss=2.0))["window"][0] == 1.0
    assert recommended(exact, at(0.25))["window"][0] == 0.25
    # The largest scale without overflow is tried before it is said that there is none.
    large = reference(gradient(18, 100))
    assert recommended(large, at(1, loss=3.0, skipped=100))["policy"] == "dynamic"


def test_one_layer_that_loses_while_another_overflows() -> None:
    exact = reference(gradient(-40, 100, name="low"), gradient(14, 100, name="high"))
    unsure = recommended(exact)
    assert (unsure["policy"], unsure["window"], unsure["init_scale"]) == ("dynamic", None, 2.0)
    assert "50.0%" in unsure["why"]
    found = recommended(exact, at(2, loss=2.8), at(64, loss=2.9))
    assert (found["policy"], found["window"]) == (None, None)
    assert "at 2^1 `low` loses 100.0%" in found["why"]
    assert "at 2^2 `high` overflows" in found["why"]
    assert "bf16" in found["why"]


def test_gradients_beyond_the_scales_that_are_judged() -> None:
    large = reference(gradient(-30, 1000, name="low"), gradient(40, 100, name="high"))
    for runs in ([], [at(1, loss=3.0, skipped=100)]):
        found = recommended(large, *runs)
        assert (found["policy"], found["set"]) == (None, None)
        assert found["why"] == "Even at 2^-8 `high` overflows."
    below = recommended(large, at(2.0**-20))["why"]
    assert below.endswith("overflows. But runs ended where fp32 did: `scale=9.53674e-07`.")
    assert recommended(reference(), at(1))["why"].startswith("No gradient that was sampled is")
    tiny = reference(gradient(-80, 100))
    assert "2^32 is the largest scale that is judged, and still" in recommended(tiny)["why"]
    assert "overflow" not in recommended(tiny, at(2.0**32, loss=3.0))["why"]


def test_what_runs_say_of_the_top_is_not_said_of_a_layer() -> None:
    exact = reference(gradient(-40, 100, name="low"), gradient(0, 100, name="high"))
    found = recommended(exact, at(4, loss=3.0), at(64, loss=3.0, skipped=9))
    assert "at 2^5 `low` loses 100.0% of its gradient, while at 2^6 runs skip" in found["why"]
    all_skip = recommended(reference(SMALL), at(2.0**-8, loss=3.0, skipped=9))
    assert all_skip["why"] == "Even at 2^-8 runs skip steps."


def test_a_run_that_skips_lowers_the_top() -> None:
    found = recommended(reference(SMALL), at(1024), at(2.0**16, skipped=1), at(2.0**20, skipped=9))
    assert found["window"] == [32.0, 2.0**15]
    one_seed = [at(2.0**16, seed=seed, skipped=seed) for seed in range(2)]
    assert recommended(reference(SMALL), at(1024), *one_seed)["window"] == [32.0, 2.0**15]
    gone_wrong = recommended(reference(SMALL), at(1, skipped=50), at(1024))
    assert gone_wrong["window"][1] == 2.0**26


def test_seeds_count_together() -> None:
    exact = [reference(SMALL, seed=seed, loss=1.0 + seed) for seed in range(3)]
    close = [at(64, seed=seed, loss=1.0 + seed + 0.01) for seed in range(3)]
    far = [at(256, seed=seed, loss=1.0 + seed + 0.3) for seed in range(3)]
    noisy = [at(512, seed=seed, loss=1.0 + seed + 0.1 * seed) for seed in range(3)]
    one_failed = [*close[:2], at(64, seed=2, status="failed", loss=None)]
    assert LossScaleSweep([*exact, *close, *far, *noisy]).matching == ("scale=64", "scale=512")
    assert LossScaleSweep([*exact, *one_failed]).matching == ()
    alone = trial("fp32", histograms=(SMALL,))
    assert LossScaleSweep([alone]).prediction.total(4.0) == LossScaleSweep(exact).prediction.total(
        4.0
    )


def test_the_largest_gradient_of_any_seed_counts() -> None:
    large = SMALL.model_copy(update={"max": 2.0**10})
    for seeds in ((SMALL, large), (large, SMALL)):
        exact = [reference(one, seed=seed) for seed, one in enumerate(seeds)]
        assert recommended(*exact)["window"] == [32.0, 32.0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_final_loss_that_is_not_finite_matches_nothing(loss: float) -> None:
    exact = [reference(SMALL, seed=seed) for seed in range(2)]
    half = [at(64, seed=0), at(64, seed=1, loss=loss)]
    assert LossScaleSweep([*exact, *half]).matching == ()
    broken = [exact[0], reference(SMALL, seed=1, loss=loss)]
    found = LossScaleSweep([*broken, at(64, seed=0), at(64, seed=1)])
    assert (found.matching, found.learnt) == (("scale=64",), 2.0)


def test_a_seed_with_which_fp32_did_not_end_is_left_out_and_said() -> None:
    large = {"layer": 2e5}
    exact = [reference(SMALL, seed=0, outputs_max=large)]
    failed = reference(SMALL, seed=1, status="failed", loss=None, first_loss=None)
    half = [at(64, seed=seed, loss=1.0 + seed) for seed in range(2)]
    found = recommended(*exact, failed, *half)
    assert (found["policy"], found["window"]) == ("dynamic", [32.0, 2.0**26])
    assert found["why"].endswith("Without seed 1, with which fp32 did not end.")
    assert "Without seed" not in recommended(*exact, half[0])["why"]
    # A run in fp16 that did not end is no match, whatever fp32 did with its seed.
    lost = at(64, seed=1, status="failed", loss=None)
    assert LossScaleSweep([*exact, failed, half[0], lost]).matching == ()


def test_runs_that_differ_wildly_do_not_match_for_their_noise() -> None:
    exact = [reference(SMALL, seed=seed) for seed in range(2)]
    wild = [at(64, seed=0, loss=1.1), at(64, seed=1, loss=3.0)]
    assert LossScaleSweep([*exact, *wild]).matching == ()


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_without_a_reference_nothing_is_recommended(status: Status) -> None:
    for trials in ([at(64)], [reference(SMALL, status=status), at(64)], []):
        found = recommended(*trials)
        assert (found["policy"], found["set"], found["confirmed"]) == (None, None, False)
        assert found["window"] is found["window_bits"] is None
    lost = recommended(reference(SMALL, status=status), at(64))["why"]
    assert ("diverged" in lost and "`optim.lr`" in lost) == (status == "diverged")
    assert "`optim.lr`" in recommended(reference(SMALL, loss=math.nan), at(64))["why"]


def test_a_reference_that_learnt_nothing_is_said_to() -> None:
    assert "learnt nothing" in recommended(reference(SMALL, loss=3.0), at(64, loss=3.0))["why"]


def test_a_row_has_what_was_predicted_and_what_was_seen() -> None:
    layer = LayerFractions(
        module="layer",
        tensor="grad_output",
        name="layer",
        elements=2000,
        fractions=Fractions(underflow=0.21, subnormal=0.5, overflow=0.0),
    )
    error = GradientError(cosine=0.99, relative=0.1)
    unheld = gradient(-30, 100, name="norm")
    rows = LossScaleSweep(
        [
            reference(SMALL, unheld),
            at(2, layers=(layer,), gradient_error=error, skipped=4),
            at(0.5),
            trial("dynamic"),
        ]
    ).rows()
    assert [row["scale"] for row in rows] == [2.0, 0.5, "dynamic"]
    first = rows[0]
    assert first["predicted"] == pytest.approx(
        {
            "underflow": 0.2,
            "subnormal": 0.55,
            "overflow": 0.0,
            "reliable": True,
            "layers_reliable": False,
        }
    )
    assert first["measured"] == {"underflow": 0.21, "subnormal": 0.5, "overflow": 0.0}
    assert (first["skips"], first["skip_rate"], first["cosine"]) == (4, 0.04, 0.99)
    assert first["layers"][0]["predicted"]["underflow"] == pytest.approx(0.2)
    assert not rows[1]["predicted"]["reliable"] and not rows[1]["predicted"]["layers_reliable"]
    assert rows[2]["predicted"] is None


def test_every_scale_is_predicted_in_total_and_of_each_tensor() -> None:
    other = gradient(-10, *[100] * 20, name="other")
    found = LossScaleSweep([reference(SMALL, other)]).predicted()
    assert [one["scale"] for one in found] == [2.0**power for power in range(-8, 33)]
    at_1 = found[8]
    assert at_1["total"]["underflow"] == pytest.approx(5 / 40)
    assert [(one["name"], one["underflow"]) for one in at_1["layers"]] == [
        ("layer", pytest.approx(5 / 20)),
        ("other", 0.0),
    ]
    assert set(at_1["layers"][0]) == {"name", "tensor", "underflow", "subnormal", "overflow"}
    lost = [one["scale"] for one in found if one["total"]["underflow"] > 0.05]
    unreliable = [one["scale"] for one in found if not one["total"]["layers_reliable"]]
    assert unreliable == lost == [2.0**power for power in range(-8, 3)]
    assert [one["scale"] for one in found if not one["total"]["reliable"]] == lost[:8]
    assert LossScaleSweep([reference()]).predicted() == ()


def test_the_window_is_in_the_words_of_every_answer_that_has_one() -> None:
    dynamic = recommended(reference(SMALL), at(1024))
    assert dynamic["why"].endswith("Window: 2^5 to 2^26, 21 bits.")
    none = recommended(reference(gradient(-20, *[100] * 20)), at(1))
    assert none["policy"] == "none" and none["why"].endswith("Window: 2^0 to 2^16, 16 bits.")
    assert "Window" not in recommended(reference(gradient(18, 100, 100)))["why"]
