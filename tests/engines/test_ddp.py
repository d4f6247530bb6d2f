"""The options of ddp, each in two processes, and what they do not change."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mpcli.launch import explained
from mpcli.plan import make_plan
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.errors import UserError
from tests import small
from tests.engines.conformance import Case, Trained, make_model, train
from tests.ranks import Group
from tests.small import small_recipe

SGD = "optim={kind: sgd, lr: 0.1, momentum: 0.9}"
DDP = "engine={kind: ddp, device: cpu, timeout_seconds: 30}"


def furthest(trained: Trained, expected: Trained) -> float:
    """Largest difference of two weights."""
    pairs = ((trained.weights[name], weight) for name, weight in expected.weights.items())
    return max((one - other).abs().max().item() for one, other in pairs)


@pytest.mark.parametrize(
    "option",
    [
        "engine.static_graph=true",
        "engine.gradient_as_bucket_view=false",
        "engine.bucket_megabytes=1",
        "engine.find_unused_parameters=true",
        pytest.param("engine.compile=true", marks=pytest.mark.slow),
    ],
)
def test_an_option_that_changes_no_number(pair: Group, option: str) -> None:
    # torch cannot accumulate with a static graph.
    case = Case((SGD,), micro_batch=8 if "static" in option else 4)
    trained = pair.run(train, replace(case, settings=(*case.settings, DDP, option)))
    assert furthest(trained[0], train(ALONE, case)) < 1e-6
    assert furthest(trained[1], trained[0]) == 0


@pytest.mark.parametrize(("dtype", "eps"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_compressed_gradients_are_rounded_sums(pair: Group, dtype: str, eps: float) -> None:
    case = Case((SGD,), micro_batch=4)
    option = f"engine.gradient_compression={dtype}"
    trained = pair.run(train, replace(case, settings=(*case.settings, DDP, option)))
    # Two roundings of gradients of at most 1 by rates of at most 0.1 / (1 - 0.9), in 8 steps.
    assert 0 < furthest(trained[0], train(ALONE, case)) < 8 * 2 * eps
    assert furthest(trained[1], trained[0]) == 0


def test_unused_parameters_with_the_option(pair: Group) -> None:
    case = Case((SGD,), model="unused", micro_batch=4)
    option = "engine.find_unused_parameters=true"
    trained = pair.run(train, replace(case, settings=(*case.settings, DDP, option)))
    assert furthest(trained[0], train(ALONE, case)) < 1e-6


def test_unused_parameters_without_the_option_are_explained(pair: Group) -> None:
    with pytest.raises(RuntimeError) as raised:
        pair.run(train, Case((SGD, DDP), model="unused"))
    told = explained(raised.value)
    assert told is not None
    assert "every parameter" in told.problems[0].what
    assert told.problems[0].path == "engine.find_unused_parameters"


def elements_added_up(ranks: Ranks, case: Case) -> list[int]:
    """Sizes of the sums over ranks of a run."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *inputs: object, **options: object) -> object:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *inputs, **options)

    with patch.object(dist, "all_reduce", counted):
        train(ranks, case)
    return sizes


def test_accumulation_adds_up_once_a_step(pair: Group) -> None:
    case = Case((SGD, DDP), steps=3)
    at_once, _ = pair.run(elements_added_up, case)
    accumulated, _ = pair.run(elements_added_up, replace(case, micro_batch=2))
    assert accumulated == at_once
    learnt = sum(p.numel() for p in make_model("net").parameters() if p.requires_grad)
    assert sum(at_once) == 3 * (learnt + 1)  # and the loss


def test_a_static_graph_with_accumulation_is_refused(tmp_path: Path) -> None:
    settings = (DDP, "engine.static_graph=true", "train.micro_batch_size=8")
    with pytest.raises(UserError) as raised:
        make_plan(small_recipe(tmp_path, *settings).recipe, small.CPU)
    assert [problem.path for problem in raised.value.problems] == ["engine.static_graph"]
    settings = (*settings, "engine.processes=2")
    assert make_plan(small_recipe(tmp_path, *settings).recipe, small.CPU).accumulation == 1


def warned(ranks: Ranks, case: Case) -> list[str]:
    """What a run warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(ranks, case)
    return [str(warning.message) for warning in caught]


def test_nothing_is_warned_of(pair: Group) -> None:
    assert pair.run(warned, Case((SGD, DDP), steps=2)) == [[], []]
    assert torch.distributed.is_initialized() is False  # in this process
