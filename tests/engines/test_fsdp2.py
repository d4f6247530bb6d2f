"""What fsdp2 has of its own: which parameters are gathered together, and types they travel in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import CommDebugMode

from mpcli.plan import make_plan
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.errors import UserError
from tests import small
from tests.engines.conformance import Case, Trained, make_engine, train
from tests.engines.test_ddp import SGD, furthest, warned
from tests.ranks import Group
from tests.small import small_recipe

FSDP2 = "engine={kind: fsdp2, device: cpu, timeout_seconds: 30}"


def groups(ranks: Ranks, case: Case) -> dict[str, Any]:
    """Names of the modules that are gathered by themselves, and where the weights lie."""
    engine = make_engine(case, ranks)
    named = engine.model.named_modules()
    before = [master.data_ptr() for master in engine.masters]
    with engine.evaluating() as model:
        model(torch.zeros(2, 1, 8, 8))
    return {
        "groups": [name for name, module in named if isinstance(module, FSDPModule)],
        "moved": before != [p.to_local().data_ptr() for p in trainable(engine.model)],
        "elements": sum(master.numel() for master in engine.masters),
    }


def trainable(model: nn.Module) -> Any:
    return [p for p in model.parameters() if p.requires_grad]


def test_blocks_are_divided_one_by_one(pair: Group) -> None:
    both = pair.run(groups, Case((SGD, FSDP2)))
    whole = sum(p.numel() for p in trainable(make_engine(Case((SGD,)), ALONE).model))
    for told in both:
        assert told["groups"] == ["", "blocks.0", "blocks.1"]
        assert not told["moved"]
    assert sum(told["elements"] for told in both) == whole


def test_islands_have_groups_of_their_own(pair: Group) -> None:
    told, _ = pair.run(groups, Case((SGD, FSDP2, "precision.mode=bf16-master")))
    norms = ["blocks.0.norm", "blocks.1.norm", "norm"]
    assert sorted(told["groups"]) == sorted(["", "blocks.0", "blocks.1", *norms])


@pytest.mark.parametrize(("dtype", "eps"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_gradients_are_rounded_to_travel(pair: Group, dtype: str, eps: float) -> None:
    case = Case((SGD,), micro_batch=4)
    option = f"engine.reduce_dtype={dtype}"
    trained = pair.run(train, replace(case, settings=(*case.settings, FSDP2, option)))
    assert 0 < furthest(trained[0], train(ALONE, case)) < 8 * 2 * eps
    assert furthest(trained[1], trained[0]) == 0


def test_unused_parameters(pair: Group) -> None:
    case = Case((SGD,), model="unused", micro_batch=4)
    trained = pair.run(train, replace(case, settings=(*case.settings, FSDP2)))
    assert furthest(trained[0], train(ALONE, case)) < 1e-6


def reduce_scatters(ranks: Ranks, case: Case) -> tuple[int, Trained]:
    """How often a run adds gradients up over the ranks, and what becomes of it."""
    with CommDebugMode() as counted:
        trained = train(ranks, case)
    calls = {str(kind): count for kind, count in counted.get_comm_counts().items()}
    return sum(count for kind, count in calls.items() if "reduce_scatter" in kind), trained


@pytest.mark.parametrize("option", ["engine.reduce_dtype=fp32", "engine.reduce_dtype=bf16"])
def test_accumulation_adds_up_once_a_step(pair: Group, option: str) -> None:
    case = Case((SGD, FSDP2, option), steps=3)
    at_once, _ = pair.run(reduce_scatters, case)
    accumulated, _ = pair.run(reduce_scatters, replace(case, micro_batch=2))
    assert at_once[0] == accumulated[0] == 3 * 3  # a step's two blocks and the rest
    if "fp32" in option:
        assert furthest(accumulated[1], at_once[1]) < 1e-6


def test_a_single_number_is_refused(pair: Group) -> None:
    with pytest.raises(UserError, match="`number` is a single number"):
        pair.run(train, Case((SGD, FSDP2), model="number"))


def test_nothing_is_warned_of(pair: Group) -> None:
    case = Case((SGD, FSDP2, "engine.reduce_dtype=bf16"), steps=2)
    assert pair.run(warned, case) == [[], []]


def test_clipping_of_units_is_refused(tmp_path: Path) -> None:
    settings = (FSDP2, "train.clip={kind: agc}", "precision.mode=fp32")
    with pytest.raises(UserError) as raised:
        make_plan(small_recipe(tmp_path, *settings).recipe, small.CPU)
    assert [problem.path for problem in raised.value.problems] == ["train.clip.kind"]


def test_as_many_forwards_in_all_processes(tmp_path: Path) -> None:
    settings = (FSDP2, "engine.processes=2", "train.global_batch_size=5")
    with pytest.raises(UserError, match="that is 2 or 1 micro-batches"):
        make_plan(small_recipe(tmp_path, *settings, "train.micro_batch_size=2").recipe, small.CPU)
    settings = (*settings, "train.micro_batch_size=3")
    assert make_plan(small_recipe(tmp_path, *settings).recipe, small.CPU).accumulation == 1
