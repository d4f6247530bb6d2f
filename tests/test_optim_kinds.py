"""Optimizers that the host steps or does not: the same transactions, and what they compute."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcli.engines.local import LocalEngine
from mpcli.optim import (
    build_optimizer,
    held_state_bytes,
    hidden_matrices,
    state_bytes,
    weights_apart,
)
from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.optim import Adafactor, AdamW, AdamW8bit, Muon, Optim, Sgd
from mpcli.tasks import task_of
from tests import small
from tests.engines.test_local import make_batch, make_loss, state_hash
from tests.host_reads import HostReads
from tests.small import resume_small, run_small, small_recipe

CPU = torch.device("cpu")
KINDS = {
    "bitsandbytes": "{kind: adamw8bit, lr: 0.01, min_8bit_size: 64}",
    "torchao": "{kind: adamw8bit, implementation: torchao, lr: 0.01, min_8bit_size: 64}",
    "adafactor": "{kind: adafactor, lr: 0.05}",
    "muon": "{kind: muon, lr: 0.01, schedule: {kind: linear, warmup: 0.5}}",
}
VIT = "task.model={kind: vit, patch_size: 2, layers: 1, heads: 2, width: 16, mlp_width: 64}"
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """torchao's step without the compiler, which takes half a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


class Net(nn.Module):
    """Whatever an optimizer tells apart: an embedding, matrices, a convolution, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.wider = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(64, 32)
        self.odd = nn.Linear(32, 9, bias=False)
        self.head = nn.Linear(9, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.norm(self.wider(self.conv(inputs).relu())).mean(1).flatten(1)
        words = self.table((features[:, :4].abs() * 8).long().clamp_max(15)).mean(1)
        hidden = self.hidden(features).relu() + torch.cat((words, words), 1)
        logits: Tensor = self.head(self.odd(hidden))
        return logits


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def make_engine(folder: Path, *settings: str, model: nn.Module | None = None) -> LocalEngine:
    recipe = small_recipe(folder, *settings).recipe
    return LocalEngine(recipe, model or make_net(), CPU, 20)


def train(engine: LocalEngine, *steps: int) -> None:
    for step in steps:
        engine.accumulate(make_loss(), make_batch(2 * step), 16, last=False)
        engine.accumulate(make_loss(), make_batch(2 * step + 1), 16, last=True)
        assert engine.step().found_inf == 0


SETTINGS = ("train.ema=0.9", "train.clip={kind: norm, max_norm: 1.0}")


@pytest.mark.parametrize("mode", ["fp32", "fp16", "fp16-master", "bf16-master"])
@kinds
def test_a_skipped_step_changes_nothing(tmp_path: Path, kind: str, mode: str) -> None:
    engine = make_engine(tmp_path, f"optim={KINDS[kind]}", f"precision.mode={mode}", *SETTINGS)
    for good_steps in (0, 2):
        train(engine, *range(good_steps))
        before = state_hash(engine)
        engine.accumulate(make_loss(), make_batch(7), 16, last=False)
        engine.accumulate(make_loss(float("inf")), make_batch(8), 16, last=True)
        assert engine.step().found_inf == 1
        assert state_hash(engine) == before
    train(engine, 9)
    assert state_hash(engine) != before
    assert all(bool(p.isfinite().all()) for p in engine.model.state_dict().values())


@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
@kinds
def test_a_restored_engine_goes_on_bit_for_bit(tmp_path: Path, kind: str, mode: str) -> None:
    settings = (f"optim={KINDS[kind]}", f"precision.mode={mode}", *SETTINGS)
    whole, first, second = (make_engine(tmp_path, *settings) for _ in range(3))
    train(whole, 0, 1, 2, 3)
    train(first, 0, 1)
    tensors, state = first.checkpoint()
    saved = {name: value.clone() for name, value in tensors.items()}
    train(second, 7, 8, 9)  # is gone back from
    second.restore(saved, state)
    train(second, 2, 3)
    assert state_hash(second) == state_hash(whole)
    places = [value.data_ptr() for s in second.optimizer.state.values() for value in s.values()]
    assert len(set(places)) == len(places)


@kinds
def test_state_is_made_before_the_first_step(tmp_path: Path, kind: str) -> None:
    engine = make_engine(tmp_path, f"optim={KINDS[kind]}")
    before = {name: value.data_ptr() for name, value in engine._state().items()}
    assert sum(name.startswith("optimizer.step.") for name in before) >= 9
    train(engine, 0, 1)
    assert {name: value.data_ptr() for name, value in engine._state().items()} == before
    for name, value in engine._state().items():
        if name.startswith("optimizer.step."):
            assert value.item() == 2, name


@pytest.mark.parametrize("kind", ["bitsandbytes", "muon", "adafactor"])
def test_the_host_reads_as_often_as_the_plan_says(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"optim={KINDS[kind]}", VIT)
    recipe = small_recipe(tmp_path, *settings).recipe
    plan = make_plan(recipe, small.CPU)
    weights = (plan.host_reads - 1) // 2
    assert bool(weights) == (kind == "adafactor")

    lists: list[int] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: lists.append(len(self)) or tolist(self))
    task = task_of(recipe.task)
    data = task.load_data(recipe.task, recipe.data)
    engine = make_engine(tmp_path, *settings, model=task.build_model(recipe.task, data.info))
    state = engine._state()
    on_the_host = sum(
        name.startswith("optimizer.step.") and (kind == "adafactor" or value.dtype == torch.int64)
        for name, value in state.items()
    )
    for factor, expected in ((1.0, on_the_host + 2 * weights), (float("inf"), 0)):
        engine.accumulate(make_loss(factor), make_batch(), 8, last=True)
        lists.clear()
        with HostReads() as reads:
            engine.step()
        assert lists == [2]  # found_inf and the rate, together
        assert reads.count == expected


@kinds
def test_a_count_of_steps_that_cannot_be_is_refused(tmp_path: Path, kind: str) -> None:
    engine = make_engine(tmp_path, f"optim={KINDS[kind]}")
    train(engine, 0)
    tensors, state = engine.checkpoint()
    tensors["optimizer.step.hidden.weight"] = torch.tensor(-1.0)
    tensors = {
        n: t.to(engine._state()[n].dtype) if n in engine._state() else t for n, t in tensors.items()
    }
    with pytest.raises(UserError, match=r"step\.hidden\.weight") as caught:
        make_engine(tmp_path, f"optim={KINDS[kind]}").restore(tensors, state)
    assert caught.value.problems[0].exit_code == Exit.CHECKPOINT


def test_no_other_optimizers_state_is_adopted(tmp_path: Path) -> None:
    """Zero moments with the count of another's steps would make the next update too large."""
    given = make_engine(tmp_path, "optim={kind: adamw, lr: 0.01}")
    train(given, 0, 1)
    engine = make_engine(tmp_path, f"optim={KINDS['bitsandbytes']}")
    engine.adopt(given.checkpoint()[0], 2)
    state, theirs = engine._state(), given._state()
    assert state["optimizer.step.hidden.weight"] == 0
    assert not state["optimizer.state1.hidden.weight"].any()
    name = "optimizer.exp_avg.table.weight"  # of 32 bits in both
    assert torch.equal(state[name], theirs[name])
    assert state["optimizer.step.table.weight"] == 2


# What they compute.


def matrices_and_vectors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 16), (16, 32), (16,), (4, 3, 3, 3), (8, 16)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def rates() -> list[float]:
    return torch.linspace(0.05, 0.01, 6).tolist()


def step_beside(
    optim: Optim, by_hand: Any, apart: tuple[str, ...] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after the same gradients and rates: of the recipe's optimizer, and of torch's."""
    ours, theirs = matrices_and_vectors(), matrices_and_vectors()
    rate = torch.tensor(optim.lr)
    named = [(f"w{number}", weight) for number, weight in enumerate(ours)]
    optimizer = build_optimizer(optim, named, rate, apart)
    references = by_hand(theirs)
    generator = torch.Generator().manual_seed(1)
    for number, value in enumerate(rates()):
        rate.fill_(value)
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            if number == 2:
                weight.grad.zero_()
            other.grad = weight.grad.clone()
        optimizer.step()
        for reference in references:
            for group in reference.param_groups:
                group["lr"] = rate.item()
            reference.step()
    return ours, theirs


def test_adafactor_is_torchs() -> None:
    def by_hand(weights: list[Tensor]) -> list[torch.optim.Optimizer]:
        groups = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.1},
            {"params": [w for w in weights if w.ndim == 1]},
        ]
        return [torch.optim.Adafactor(groups, eps=(1e-10, 1e-2), d=2.0, beta2_decay=-0.7)]

    optim = Adafactor(
        kind="adafactor",
        lr=0.05,
        beta2_decay=-0.7,
        eps=(1e-10, 1e-2),
        clipping_threshold=2.0,
        weight_decay=0.1,
    )
    for ours, theirs in zip(*step_beside(optim, by_hand), strict=True):
        assert torch.equal(ours, theirs)


def test_muon_is_torchs_with_adamw() -> None:
    def by_hand(weights: list[Tensor]) -> list[torch.optim.Optimizer]:
        others = [
            {"params": [weights[3], weights[4]], "weight_decay": 0.05},
            {"params": [weights[2]], "weight_decay": 0.0},
        ]
        return [
            torch.optim.Muon(
                weights[:2], momentum=0.9, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, betas=(0.8, 0.9), eps=1e-6, fused=True),
        ]

    optim = Muon(kind="muon", lr=0.05, momentum=0.9, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.05)
    for ours, theirs in zip(*step_beside(optim, by_hand, apart=("w4",)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("implementation", ["bitsandbytes", "torchao"])
def test_weights_below_the_least_size_are_stepped_as_by_adamw(implementation: Any) -> None:
    def by_hand(weights: list[Tensor]) -> list[torch.optim.Optimizer]:
        groups = [
            {"params": [w for w in weights if w.ndim > 1]},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups)]

    optim = AdamW8bit(kind="adamw8bit", lr=0.05, implementation=implementation, min_8bit_size=2**30)
    for ours, theirs in zip(*step_beside(optim, by_hand), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["bitsandbytes", "torchao"])
def test_8bit_steps_are_near_those_of_adamw(implementation: Any) -> None:
    """200 steps towards a solution of least squares: both arrive, by nearly the same way."""
    inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    solution = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    optims: list[Optim] = [
        AdamW(kind="adamw", lr=0.05),
        AdamW8bit(kind="adamw8bit", lr=0.05, implementation=implementation),
    ]
    ends, losses = [], []
    for optim in optims:
        weight = torch.zeros(64, 64, requires_grad=True)
        rate = torch.tensor(0.05)
        optimizer = build_optimizer(optim, [("w", weight)], rate)
        for step in range(200):
            rate.fill_(0.05 * (1 - step / 200))
            loss = (inputs @ (weight - solution)).square().mean()
            (weight.grad,) = torch.autograd.grad(loss, [weight])
            optimizer.step()
        ends.append(weight.detach())
        losses.append(loss.item())
    exact, eight = ends
    assert losses[1] < 1e-2 * inputs.square().mean().item() * 64
    assert (exact - eight).norm() < 0.05 * exact.norm()


def test_adafactor_steps_over_gradients_of_zero() -> None:
    """Of a row that no batch had, such as a rare word's: torch divides zero by zero with eps 0."""
    weight = torch.ones(4, 4, requires_grad=True)
    optimizer = build_optimizer(
        Adafactor(kind="adafactor", lr=0.1), [("w", weight)], torch.tensor(0.1)
    )
    weight.grad = torch.zeros(4, 4)
    weight.grad[0] = 1e-12
    optimizer.step()
    assert bool((weight[1:] == 1).all())
    assert bool((weight[0] < 1).all())


@pytest.mark.parametrize("implementation", ["bitsandbytes", "torchao"])
def test_8bit_states_are_of_elements_in_order(implementation: Any) -> None:
    """A weight that lies channels last in memory is stepped as one that does not."""
    optim = AdamW8bit(kind="adamw8bit", lr=0.1, implementation=implementation, min_8bit_size=1)
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(16, 8, 3, 2, generator=generator).to(memory_format=memory_format)
        optimizer = build_optimizer(optim, [("w", weight)], torch.tensor(0.1))
        for _ in range(3):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = gradient.to(memory_format=memory_format)
            optimizer.step()
        ends.append(weight)
    assert torch.equal(*ends)


def test_which_weights_are_apart() -> None:
    net = make_net()
    eight = AdamW8bit(kind="adamw8bit", lr=1.0)
    assert weights_apart(eight, net) == {"table.weight"}
    assert weights_apart(Muon(kind="muon", lr=1.0), net) == {
        "table.weight",
        "head.weight",
        "head.bias",
    }
    assert not weights_apart(AdamW(kind="adamw", lr=1.0), net)
    assert hidden_matrices(net) == ["hidden.weight", "odd.weight"]


OPTIMS: list[Optim] = [
    Sgd(kind="sgd", lr=0.1),
    Sgd(kind="sgd", lr=0.1, momentum=0.9),
    AdamW(kind="adamw", lr=0.1),
    AdamW8bit(kind="adamw8bit", lr=0.1),
    AdamW8bit(kind="adamw8bit", lr=0.1, min_8bit_size=10),
    AdamW8bit(kind="adamw8bit", lr=0.1, implementation="torchao", min_8bit_size=10),
    Adafactor(kind="adafactor", lr=0.1),
    Muon(kind="muon", lr=0.1),
]


@pytest.mark.parametrize("optim", OPTIMS, ids=lambda optim: optim.kind)
def test_bytes_of_state_are_known_before_it_is_made(optim: Optim) -> None:
    model = make_net()
    named = list(model.named_parameters())
    apart = weights_apart(optim, model)
    shapes = [(name, weight.to("meta")) for name, weight in named]
    optimizer = build_optimizer(optim, named, torch.tensor(0.1), apart)
    assert state_bytes(optim, shapes, apart) == held_state_bytes(optimizer)


# What the plan refuses.


def problems(folder: Path, *settings: str) -> dict[str | None, tuple[str, str | None, Exit]]:
    with pytest.raises(UserError) as caught:
        make_plan(small_recipe(folder, *settings).recipe, small.CPU)
    return {p.path: (p.what, p.hint, p.exit_code) for p in caught.value.problems}


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_package_is_asked_for(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == package else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    what, hint, code = problems(tmp_path, f"optim={KINDS[package]}")["optim.implementation"]
    assert code == Exit.ENVIRONMENT
    assert what == f"the package {package} is not installed"
    assert hint == f"pip install 'mptrain[{package}]'"


def test_torchao_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    what, hint, code = problems(tmp_path, f"optim={KINDS['torchao']}")["optim.implementation"]
    assert code == Exit.ENVIRONMENT
    assert "g++" in what
    assert "bitsandbytes" in str(hint)


VIT = "task.model={kind: vit, patch_size: 2, layers: 1, heads: 2, width: 16, mlp_width: 64}"


@pytest.mark.parametrize(
    "setting", ["engine={kind: fsdp2, device: cpu}", "precision.mode=bf16-pure"]
)
@pytest.mark.parametrize("kind", ["bitsandbytes", "adafactor", "muon"])
def test_what_is_not_of_whole_fp32_weights_is_refused(
    tmp_path: Path, kind: str, setting: str
) -> None:
    _, hint, code = problems(tmp_path, f"optim={KINDS[kind]}", VIT, setting)["optim.kind"]
    assert code == Exit.USAGE
    assert "adamw" in str(hint)


def test_muon_wants_hidden_matrices(tmp_path: Path) -> None:
    what, hint, _ = problems(tmp_path, f"optim={KINDS['muon']}")["optim.kind"]
    assert "no matrices" in what
    assert hint == "use `kind: adamw`"


@pytest.mark.parametrize("kind", ["bitsandbytes", "adafactor", "muon"])
def test_a_run_logs_the_bytes_of_its_state(tmp_path: Path, kind: str) -> None:
    run, result = run_small(tmp_path, f"optim={KINDS[kind]}", VIT)
    assert result.status == "done"
    log = (run.attempt_path / "log.rank0.txt").read_text()
    assert "optimizer state: " in log


@pytest.mark.parametrize("kind", ["bitsandbytes", "adafactor"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    optim = f"optim={KINDS[kind]}"
    whole, _ = run_small(tmp_path, optim, "train.steps=6", name="whole")
    parts, _ = run_small(tmp_path, optim, "train.steps=3", name="parts")
    assert resume_small(parts, "train.steps=6").status == "done"
    losses = [[row.loss for row in run.steps()] for run in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_torchao_compiles_its_step(tmp_path: Path) -> None:
    torch.compiler.set_stance("default")
    settings = (f"optim={KINDS['torchao']}", "precision.mode=bf16")
    compiled, eager = make_engine(tmp_path, *settings), make_engine(tmp_path, *settings)
    train(compiled, 0, 1, 2)
    with torch.compiler.set_stance("force_eager"):
        train(eager, 0, 1, 2)
    for name, value in eager.weights().items():
        torch.testing.assert_close(compiled.weights()[name], value, rtol=0.02, atol=0.01)
