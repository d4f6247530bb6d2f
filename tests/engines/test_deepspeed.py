"""What deepspeed has of its own: stages, where parts lie, and what it is told."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcli.engines import deepspeed
from mpcli.plan import make_plan
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.engine import DeepSpeed
from mpcli.recipe.errors import Exit, UserError
from mpcli.tasks import task_of
from tests import small
from tests.engines.conformance import Case, make_engine, make_model, train
from tests.engines.test_conformance import (
    ADAMW,
    CLIP,
    DYNAMIC,
    ROUNDED,
    SGD,
    alone,
    assert_same,
    of_no_rank,
    together,
)
from tests.engines.test_ddp import furthest, warned
from tests.ranks import Group, ranks_of
from tests.small import small_recipe

ZERO = "engine={kind: deepspeed, device: cpu, timeout_seconds: 30, %s}"
THREE = ("engine.stage=3",)
slow = pytest.mark.slow


@slow
@pytest.mark.parametrize(
    "options",
    [
        "stage: 1, offload: true",
        "stage: 2",
        "stage: 3",
        "stage: 3, offload: true",
        "stage: 3, offload: true, offload_parameters: true",
    ],
)
def test_every_stage_does_what_local_does(pair: Group, options: str) -> None:
    case = Case((ADAMW, CLIP, "train.ema=0.9"), micro_batch=4)
    first, second = pair.run(train, replace(case, settings=(*case.settings, ZERO % options)))
    assert repr(first.rows) == repr(second.rows)
    assert_same(replace(first, samples=alone(case).samples), alone(case), 1e-6)


@slow
@pytest.mark.parametrize("model", ["tied", "unused", "channels last"])
@pytest.mark.parametrize("number", [2, 3])
def test_models(pair: Group, model: str, number: int) -> None:
    """Shared weights, weights that the loss does not depend on, another memory format."""
    case = Case((SGD,), model=model, micro_batch=8, steps=3)
    trained = together(pair, case, "deepspeed", f"engine.stage={number}")
    assert furthest(trained, alone(case)) < 1e-6


@slow
@pytest.mark.parametrize("options", ["stage: 2, offload: true", "stage: 3, offload: true"])
def test_a_weight_that_the_last_micro_batch_does_not_use_learns(options: str) -> None:
    case = Case((SGD,), model="sometimes", micro_batch=4)
    with ranks_of(1) as single:
        trained = single.run(train, replace(case, settings=(SGD, ZERO % options)))[0]
    assert furthest(trained, alone(case)) == 0


@slow
@pytest.mark.parametrize("options", ["stage: 1", "stage: 2, offload: true"])
def test_weights_that_only_some_ranks_use_are_refused(pair: Group, options: str) -> None:
    """Those of one rank would be stepped by the gradients of others, which are as large."""
    case = Case((SGD, ZERO % options), model="either")
    with pytest.raises(UserError, match="processes used different weights in a step") as raised:
        pair.run(train, case)
    assert raised.value.exit_code == 2
    assert pair.run(train, Case((SGD, ZERO % options), steps=1))  # both know, and nobody waits


@slow
def test_an_overflow_in_one_rank_of_stage_3(pair: Group) -> None:
    settings = (DYNAMIC, "precision.mode=fp16", SGD)
    case = Case(settings, micro_batch=4, overflows=(2,), sampled=(1,), steps=4)
    trained, expected = together(pair, case, "deepspeed", *THREE), alone(case)
    assert_same(trained, expected, ROUNDED)
    assert [row[3] for row in trained.rows] == [0, 0, 1, 0]
    for name, value in of_no_rank(trained.before_overflow).items():
        if not name.startswith("scaler."):
            assert torch.equal(trained.after_overflow[name], value), name
    seen, theirs = ({(r.name, r.tensor) for r in run.seen} for run in (trained, expected))
    assert seen == theirs


@slow
def test_a_run_goes_on_with_another_engine_and_other_processes(pair: Group) -> None:
    """Local, ZeRO-3 in two processes, two of fsdp2, ZeRO-2 in two, local: as if local went on."""
    case = Case((ADAMW, "train.ema=0.9", CLIP), steps=2)
    whole = alone(replace(case, steps=10))
    done = first = alone(case)
    rows, samples = [*first.rows], [*first.samples]
    for engine, options in (("deepspeed", THREE), ("fsdp2", ()), ("deepspeed", ())):
        done = together(pair, replace(case, start=done.checkpoint), engine, *options)
        rows, samples = rows + done.rows, samples + done.samples
    last = train(ALONE, replace(case, start=done.checkpoint))
    rows, samples = rows + last.rows, samples + last.samples
    assert_same(replace(last, rows=rows, samples=samples), whole, 1e-6)


def held(ranks: Ranks, case: Case) -> dict[str, int]:
    """Elements that a rank holds between two steps."""
    engine = make_engine(case, ranks)
    return {
        "stepped": sum(master.numel() for master in engine.masters),
        "state": sum(s["exp_avg"].numel() for s in engine.optimizer.state.values()),
        "matrices": sum(p.numel() for p in engine.model.parameters() if p.ndim > 1),
    }


@slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_is_divided(pair: Group, number: int) -> None:
    both = pair.run(held, Case((ADAMW, ZERO % f"stage: {number}")))
    model = make_model("net")
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(told["stepped"] for told in both) == whole
    for told in both:
        assert told["state"] == told["stepped"] < 0.6 * whole
        # In stage 3 a weight that is not needed is nowhere whole.
        assert bool(told["matrices"]) == (number < 3)


@slow
def test_nothing_is_warned_of(pair: Group) -> None:
    assert pair.run(warned, Case((SGD, ZERO % "stage: 3"), steps=2)) == [[], []]


@slow
def test_a_single_number_is_refused(pair: Group) -> None:
    with pytest.raises(UserError, match="`number` is a single number, which ZeRO cannot divide"):
        pair.run(train, Case((SGD, ZERO % "stage: 2"), model="number"))


def refused(folder: Path, *settings: str) -> dict[str, tuple[str, str, int]]:
    """What, remedy and exit code, by recipe path."""
    with pytest.raises(UserError) as raised:
        make_plan(small_recipe(folder, *settings).recipe, small.CPU)
    return {p.path: (p.what, p.hint or "", p.exit_code) for p in raised.value.problems}


def test_what_it_cannot_do_is_refused_before_anything_starts(tmp_path: Path) -> None:
    settings = (ZERO % "offload: true", "train.clip={kind: agc}", "precision.mode=bf16-master")
    found = refused(tmp_path, *settings)
    assert found.keys() == {"train.clip.kind", "precision.mode"}
    assert "`kind: fsdp2`" in found["precision.mode"][1]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    what, hint, code = refused(tmp_path, ZERO % "offload: true")["engine.kind"]
    assert "deepspeed is not installed" in what and code == Exit.ENVIRONMENT
    assert "pip install 'mptrain[deepspeed]'" in hint
    assert "engine: {kind: fsdp2, cpu_offload: true}" in hint
    recipe = small_recipe(tmp_path, ZERO % "offload: true").recipe
    assert make_plan(recipe, small.CPU, training=False)  # to evaluate it is not needed


@pytest.mark.parametrize(
    ("engine", "reads"),
    [
        ("deepspeed, stage: 3", lambda weights: 0),
        ("deepspeed, offload: true", lambda weights: 1 + 2 * weights),
        ("fsdp2", lambda weights: 0),
        ("fsdp2, cpu_offload: true", lambda weights: 1 + weights),
    ],
)
def test_a_step_on_the_host_declares_its_reads(
    tmp_path: Path, engine: str, reads: Callable[[int], int]
) -> None:
    """Of two micro-batches: each one's gradients, or their sum's, and the step's numbers."""
    settings = (f"engine={{kind: {engine}, device: cpu}}", "train.micro_batch_size=8")
    recipe = small_recipe(tmp_path, *settings).recipe
    task = task_of(recipe.task)
    model = task.build_model(recipe.task, task.load_data(recipe.task, recipe.data).info)
    weights = sum(p.requires_grad for p in model.parameters())
    assert make_plan(recipe, small.CPU).host_reads == reads(weights)


def told(device: str, **options: Any) -> dict[str, Any]:
    engine = DeepSpeed(kind="deepspeed", **options)
    config = deepspeed.library_config(engine, make_model("net"), torch.device(device))
    zero: dict[str, Any] = config["zero_optimization"]
    return zero


def test_what_deepspeed_is_told() -> None:
    assert "offload_optimizer" not in told("cuda")
    offloaded = told("cuda", stage=3, offload=True, offload_parameters=True)
    assert offloaded["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert offloaded["offload_param"] == offloaded["offload_optimizer"]
    assert offloaded["stage3_param_persistence_threshold"] == 25  # one more than the longest bias
    assert told("cpu", offload=True)["offload_optimizer"]["pin_memory"] is False
