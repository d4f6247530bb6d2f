"""One meaning of a recipe: what the others make of it with two processes is what local does."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mpcli.ranks import ALONE
from mpcli.recipe.errors import UserError
from tests.engines.conformance import STEPS, Case, Trained, train
from tests.ranks import Group, ranks_of

ENGINES = {
    "ddp": "engine={kind: ddp, device: cpu, timeout_seconds: 30}",
    "fsdp2": "engine={kind: fsdp2, device: cpu, timeout_seconds: 30}",
    "deepspeed": "engine={kind: deepspeed, device: cpu, offload: true, timeout_seconds: 30}",
}
SLOW = "deepspeed"  # to import
EACH = pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=[pytest.mark.slow] * (e == SLOW)) for e in ENGINES]
)
SGD = "optim={kind: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.01}"
# With the usual eps, Adam divides roundings of small gradients by each other.
ADAMW = "optim={kind: adamw, lr: 0.01, eps: 1e-4}"
CLIP = "train.clip={kind: norm, max_norm: 0.5}"
DYNAMIC = "precision.loss_scale={kind: dynamic, init_scale: 1024, growth_interval: 3}"


@functools.cache
def alone(case: Case) -> Trained:
    """The case in one process, with the engine local."""
    return train(ALONE, case)


def together(pair: Group, case: Case, engine: str, *options: str) -> Trained:
    """The case in two processes: rank 0's answer, after all that both have was compared."""
    settings = (*case.settings, ENGINES[engine], *options)
    first, second = pair.run(train, replace(case, settings=settings))
    assert repr(first.rows) == repr(second.rows)  # NaN too
    assert_close(second.weights, first.weights, 0.0)
    assert torch.equal(first.logits, second.logits)
    samples = [[*one, *other] for one, other in zip(first.samples, second.samples, strict=True)]
    return replace(first, samples=samples)


def assert_same(trained: Trained, expected: Trained, tolerance: float) -> None:
    """Weights, what was saved and evaluated, rows, types and samples, within one mode."""
    assert trained.samples == expected.samples
    for row, other in zip(trained.rows, expected.rows, strict=True):
        assert row[2:] == other[2:]  # scale and found_inf
        if not row[3]:
            assert row[:2] == pytest.approx(other[:2], rel=tolerance)
    assert_close(trained.weights, expected.weights, tolerance)
    assert_close(trained.final, expected.final, tolerance)
    torch.testing.assert_close(trained.logits, expected.logits, rtol=0, atol=10 * tolerance)
    tensors, numbers = trained.checkpoint
    theirs, their_numbers = expected.checkpoint
    assert numbers == their_numbers
    assert_close(of_no_rank(tensors), of_no_rank(theirs), tolerance)
    assert trained.observed == expected.observed
    assert trained.names == expected.names


def of_no_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("rng.")}


def assert_close(tensors: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    """The same names and types; the values as close as is said, or one rounding of half apart."""
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        rtol = torch.finfo(value.dtype).eps if value.element_size() == 2 else 0.0
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=name)


@EACH
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_fp32(pair: Group, engine: str, optimizer: str) -> None:
    case = Case(("train.ema=0.9", CLIP, optimizer))
    expected = alone(case)
    assert_same(together(pair, case, engine), expected, 1e-6)
    assert max(norm for _, norm, *_ in expected.rows) > 0.5  # some were clipped


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_one_process(mode: str) -> None:
    """Nothing is divided: no bit differs, but for the norm, which is squared and rooted again."""
    case = Case((SGD, f"precision.mode={mode}"), micro_batch=4)
    with ranks_of(1) as single:
        for engine in ENGINES.values():
            trained = single.run(train, replace(case, settings=(*case.settings, engine)))[0]
            assert_close(trained.weights, alone(case).weights, 0.0)
            assert trained.checkpoint[0].keys() == alone(case).checkpoint[0].keys()


@EACH
def test_accumulation_changes_nothing(pair: Group, engine: str) -> None:
    case = Case(("train.clip={kind: value, clip_value: 0.01}", SGD))
    accumulated = together(pair, replace(case, micro_batch=2), engine)
    assert_same(accumulated, alone(case), 1e-6)


# Micro-batches are the same, so gradients differ in the order of sums only, which is 1e-7 in fp32.
# But a weight that differs in its last bit may round to the next half number, and an activation
# with it: one that did would move a weight by some 1e-5.
ROUNDED = 2e-5
# Where sums are in half too, each is a unit in the last place from another.
HALF = {
    ("ddp", "bf16"): ROUNDED,
    ("ddp", "fp16"): ROUNDED,
    ("ddp", "bf16-pure"): torch.finfo(torch.bfloat16).eps,
    ("ddp", "fp16-pure"): torch.finfo(torch.float16).eps,
    ("fsdp2", "bf16"): ROUNDED,
    ("fsdp2", "fp16"): ROUNDED,
    ("fsdp2", "bf16-master"): ROUNDED,
    ("fsdp2", "fp16-master"): ROUNDED,
    ("deepspeed", "bf16"): ROUNDED,
    ("deepspeed", "fp16"): ROUNDED,
}


def pairs(*cases: tuple[str, str]) -> pytest.MarkDecorator:
    """Engines and modes; those that are slow to import marked."""
    marks = {True: [pytest.mark.slow], False: []}
    marked = [pytest.param(*case, marks=marks[case[0] == SLOW]) for case in cases]
    return pytest.mark.parametrize(("engine", "mode"), marked)


@pairs(*HALF)
def test_half_modes(pair: Group, engine: str, mode: str) -> None:
    scale = "precision.loss_scale={kind: static, scale: 256}"
    settings = (f"precision.mode={mode}", *([scale] if "fp16" in mode else []), SGD, CLIP)
    case = Case(settings, micro_batch=4)
    expected = alone(case)
    assert not any(found_inf for *_, found_inf in expected.rows)
    assert_same(together(pair, case, engine), expected, HALF[engine, mode])


@pairs(("ddp", "fp16"), ("fsdp2", "fp16"), ("fsdp2", "fp16-master"), ("deepspeed", "fp16"))
def test_an_overflow_in_one_rank_skips_the_step_in_all(pair: Group, engine: str, mode: str) -> None:
    settings = (DYNAMIC, f"precision.mode={mode}", SGD, "train.ema=0.9")
    case = Case(settings, micro_batch=4, overflows=(4,))
    trained, expected = together(pair, case, engine), alone(case)
    assert_same(trained, expected, ROUNDED)
    assert [row[3] for row in trained.rows] == [step == 4 for step in range(STEPS)]
    before, after = trained.before_overflow, trained.after_overflow
    for name, value in before.items():
        if not name.startswith(("scaler.", "rng.")):
            assert torch.equal(after[name], value), name
    assert after["scaler.scale"] == before["scaler.scale"] / 2


VARIANTS: dict[str, tuple[str, Case, tuple[str, ...]]] = {
    "cpu_offload": ("fsdp2", Case((SGD, CLIP)), ("engine.cpu_offload=true",)),
    "no reshard": ("fsdp2", Case((SGD, "train.ema=0.9")), ("engine.reshard_after_forward=false",)),
    "ddp, uneven": ("ddp", Case((SGD,), batch=5, micro_batch=2), ()),
    "fsdp2, uneven": ("fsdp2", Case((SGD,), batch=5, micro_batch=3), ()),
    "fsdp2, in place": ("fsdp2", Case((SGD,), model="in place"), ()),
    "ddp, channels last": ("ddp", Case((SGD,), model="channels last"), ()),
    "fsdp2, channels last": ("fsdp2", Case((SGD,), model="channels last"), ()),
    "ddp, tied": ("ddp", Case((SGD,), model="tied"), ()),
    "fsdp2, tied": ("fsdp2", Case((SGD,), model="tied", micro_batch=4), ()),
    "fsdp2, tied island": (
        "fsdp2",
        Case(
            (SGD, "precision={mode: bf16-master, sensitive_layers: [between]}"),
            model="tied",
            micro_batch=4,
        ),
        (),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(pair: Group, variant: str) -> None:
    engine, case, options = VARIANTS[variant]
    half = any("bf16" in setting for setting in case.settings)
    assert_same(together(pair, case, engine, *options), alone(case), ROUNDED if half else 1e-6)


@pairs(("ddp", "fp32"), ("fsdp2", "fp32"), ("fsdp2", "bf16-master"), ("deepspeed", "fp32"))
def test_activation_checkpointing(pair: Group, engine: str, mode: str) -> None:
    case = Case((SGD, f"precision.mode={mode}"), micro_batch=4)
    recomputed = together(pair, case, engine, "engine.activation_checkpointing=true")
    assert_same(recomputed, alone(case), 1e-6 if mode == "fp32" else ROUNDED)


@EACH
def test_the_probe_sees_whole_tensors(pair: Group, engine: str) -> None:
    case = Case((SGD, DYNAMIC, "precision.mode=fp16"), micro_batch=4, sampled=(1,))
    trained, expected = together(pair, case, engine), alone(case)
    assert [row.name for row in trained.seen] == [row.name for row in expected.seen]
    for row, other in zip(trained.seen, expected.seen, strict=True):
        if row.tensor in ("weight", "grad", "update"):
            assert (row.elements, row.dtype, row.scale) == (
                other.elements,
                other.dtype,
                other.scale,
            )
            assert row.rms == pytest.approx(other.rms, rel=1e-4)
            assert row.max == pytest.approx(other.max, rel=1e-4)


def test_a_run_goes_on_with_another_engine_and_other_processes(pair: Group) -> None:
    """Local, two of ddp, two of fsdp2, local: as if local had gone on."""
    case = Case((ADAMW, "train.ema=0.9", CLIP), steps=2)
    whole = alone(replace(case, steps=8))
    first = alone(case)
    second = together(pair, replace(case, start=first.checkpoint), "ddp")
    third = together(pair, replace(case, start=second.checkpoint), "fsdp2")
    fourth = train(ALONE, replace(case, start=third.checkpoint))
    rows = first.rows + second.rows + third.rows + fourth.rows
    samples = first.samples + second.samples + third.samples + fourth.samples
    assert_same(replace(fourth, rows=rows, samples=samples), whole, 1e-6)


def test_a_checkpoint_of_masters_goes_from_fsdp2_to_local(pair: Group) -> None:
    case = Case((SGD, "precision.mode=bf16-master"), micro_batch=4, steps=4)
    first = together(pair, case, "fsdp2")
    second = train(ALONE, replace(case, start=first.checkpoint))
    back = together(pair, replace(case, start=second.checkpoint, steps=0), "fsdp2")
    for name, value in of_no_rank(second.checkpoint[0]).items():
        assert torch.equal(back.checkpoint[0][name], value), name


@EACH
def test_a_checkpoint_of_something_else_is_refused(pair: Group, engine: str) -> None:
    tensors, numbers = alone(Case((SGD,))).checkpoint
    wrong = tensors | {"model.head.weight": torch.zeros(4, 16)}
    with pytest.raises(UserError, match=r"`model\.head\.weight` is .*4, 16"):
        together(pair, Case((SGD,), start=(wrong, numbers)), engine)


@EACH
def test_batch_norm_statistics_of_rank_0_are_saved(pair: Group, engine: str) -> None:
    trained = pair.run(train, Case((SGD, ENGINES[engine]), model="sequential"))
    saved = trained[0].checkpoint[0]["buffer.1.running_mean"]
    assert math.isfinite(saved.sum())
    assert torch.equal(saved, trained[0].weights["1.running_mean"])
    assert not torch.equal(saved, trained[1].weights["1.running_mean"])
