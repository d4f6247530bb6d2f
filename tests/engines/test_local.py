"""The transactional step: exact gradients, and a skipped step that changes nothing."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.engines.local import LocalEngine
from mpcli.plan.precision import fp32_islands
from mpcli.precision.observe import TypesObserver
from tests import small
from tests.host_reads import HostReads
from tests.small import small_recipe

CPU = torch.device("cpu")
OPTIMIZERS = {
    "sgd": "{kind: sgd, lr: 0.1}",
    "sgd-momentum": "{kind: sgd, lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.01}",
    "adam": "{kind: adam, lr: 0.01}",
    "adamw": "{kind: adamw, lr: 0.01, schedule: {kind: linear, warmup: 0.5}}",
}
MODES = {
    "fp32": "{mode: fp32}",
    "bf16": "{mode: bf16}",
    "fp16": "{mode: fp16}",
    "fp16-master": "{mode: fp16-master}",
    "bf16-master": "{mode: bf16-master}",
    "fp16-pure": "{mode: fp16-pure}",
    "bf16-pure": "{mode: bf16-pure}",
    "bf16-pure-stochastic": "{mode: bf16-pure, stochastic_rounding: true}",
}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
    )


def make_engine(
    tmp_path: Path,
    *overrides: str,
    model: nn.Module | None = None,
    device: torch.device = CPU,
) -> LocalEngine:
    """An engine with the fp32 islands that a plan would give it."""
    recipe = small_recipe(tmp_path, *overrides).recipe
    model = (model or make_net()).to(device)
    islands = fp32_islands(recipe.precision, model, device, small.CPU)
    return LocalEngine(recipe, model, device, 20, islands)


def make_batch(seed: int = 0, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 1, 8, 8, generator=generator)
    targets = torch.randint(0, 3, (size,), generator=generator)
    return Batch({"inputs": inputs, "targets": targets})


def make_loss(factor: float = 1.0) -> Any:
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        logits = model(batch["inputs"]).float()
        total = nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")
        return factor * total, batch.weight

    return loss


def state_hash(engine: LocalEngine) -> str:
    """Of everything that a step may change, but the loss scale."""
    digest = hashlib.sha256()
    tensors = [*engine.model.state_dict().values(), *engine.masters, *engine.average]
    tensors.append(engine.applied)
    for state in engine.optimizer.state.values():
        tensors += [value for _, value in sorted(state.items())]
    for tensor in tensors:
        digest.update(str((tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("good_steps_before", [0, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(
    tmp_path: Path, optimizer: str, good_steps_before: int, mode: str
) -> None:
    # With the default of 1e-8 pure fp16 diverges: its second moments become zero.
    eps = ["optim.eps=1e-4"] if mode == "fp16-pure" and "adam" in optimizer else []
    engine = make_engine(
        tmp_path,
        f"optim={OPTIMIZERS[optimizer]}",
        f"precision={MODES[mode]}",
        "train.ema=0.9",
        "train.clip={kind: norm, max_norm: 1.0}",
        *eps,
    )
    for step in range(good_steps_before):
        engine.accumulate(make_loss(), make_batch(step), 8, last=True)
        assert engine.step().found_inf == 0
    before = state_hash(engine)

    # The overflow comes in the second of two micro-batches.
    engine.accumulate(make_loss(), make_batch(7), 8, last=False)
    engine.accumulate(make_loss(float("inf")), make_batch(8), 8, last=True)
    assert engine.step().found_inf == 1
    assert state_hash(engine) == before
    assert engine.applied.item() == good_steps_before

    engine.accumulate(make_loss(), make_batch(9), 8, last=True)
    assert engine.step().found_inf == 0
    assert state_hash(engine) != before
    assert all(bool(p.isfinite().all()) for p in engine.model.state_dict().values())


def test_skipped_steps_do_not_influence_later_ones(tmp_path: Path) -> None:
    """With the scale held still, a run with skipped steps ends where one without them ends."""
    settings = ("precision={mode: fp16, loss_scale: {kind: static, scale: 1024}}", "train.ema=0.5")
    clean, disturbed = make_engine(tmp_path, *settings), make_engine(tmp_path, *settings)
    for step in range(6):
        for engine in (clean, disturbed):
            engine.accumulate(make_loss(), make_batch(step), 8, last=True)
            engine.step()
        if step in (0, 2, 3):
            disturbed.accumulate(make_loss(float("nan")), make_batch(99), 8, last=True)
            disturbed.step()
    assert state_hash(clean) == state_hash(disturbed)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    tmp_path: Path, micro_batch_size: int
) -> None:
    whole, parts = make_engine(tmp_path), make_engine(tmp_path)
    for engine in (whole, parts):
        engine.model.eval()  # BatchNorm's statistics depend on the micro-batch, rightly
    batch = make_batch()
    whole.accumulate(make_loss(), batch, 8, last=True)
    for part in batch.split(micro_batch_size):
        parts.accumulate(make_loss(), part, 8, last=False)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


CLIPS = {
    "norm": "{kind: norm, max_norm: 0.05}",
    "value": "{kind: value, clip_value: 0.001}",
    "agc": "{kind: agc, clipping: 0.001}",
}


@example(exponent=-6, clip="norm", parts=1)
@example(exponent=0, clip="norm", parts=1)
@example(exponent=16, clip="norm", parts=1)
@given(exponent=st.integers(-20, 40), clip=st.sampled_from(sorted(CLIPS)), parts=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_norm_and_clipping_do_not_depend_on_the_scale(
    tmp_path_factory: pytest.TempPathFactory, exponent: int, clip: str, parts: int
) -> None:
    """Powers of two are exact in fp32, so the steps are bit-equal, over micro-batches too."""
    folder, clipped = tmp_path_factory.mktemp("clip"), f"train.clip={CLIPS[clip]}"
    static = f"precision.loss_scale={{kind: static, scale: {2.0**exponent}}}"
    plain, scaled = make_engine(folder, clipped), make_engine(folder, clipped, static)
    free = make_engine(folder)
    norms = []
    for engine in (plain, scaled, free):
        for part in range(parts):
            engine.accumulate(make_loss(), make_batch(part), 8 * parts, last=part == parts - 1)
        norms.append(engine.step().grad_norm)
    assert torch.equal(norms[0], norms[1])
    assert norms[0] > 0.05
    assert state_hash(plain) == state_hash(scaled)
    assert state_hash(plain) != state_hash(free)


@pytest.mark.parametrize("exponent", [-8, 0, 12])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("mode", ["bf16-master", "bf16-pure"])
def test_clipping_does_not_depend_on_the_scale_where_weights_are_half(
    tmp_path: Path, mode: str, clip: str, exponent: int
) -> None:
    """bf16 has fp32's range, so powers of two are exact in it too."""
    hashes, norms = [], []
    for scale in (1.0, 2.0**exponent):
        static = f"precision={{mode: {mode}, loss_scale: {{kind: static, scale: {scale}}}}}"
        engine = make_engine(tmp_path, static, f"train.clip={CLIPS[clip]}")
        for part in range(2):
            engine.accumulate(make_loss(), make_batch(part), 16, last=part == 1)
        norms.append(engine.step().grad_norm)
        hashes.append(state_hash(engine))
    assert torch.equal(*norms)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("mode", ["fp32", "bf16-master", "bf16-pure"])
def test_adaptive_clipping_leaves_the_last_layer_alone(tmp_path: Path, mode: str) -> None:
    settings = (f"precision.mode={mode}", "optim={kind: sgd, lr: 1}")
    clipped = make_engine(tmp_path, "train.clip={kind: agc, clipping: 1e-6}", *settings)
    free = make_engine(tmp_path, *settings)
    for engine in (clipped, free):
        engine.accumulate(make_loss(), make_batch(), 8, last=True)
        engine.step()
    pairs = zip(clipped.model.named_parameters(), free.model.parameters(), strict=True)
    equal = {name for (name, a), b in pairs if torch.equal(a, b)}
    assert {"4.weight", "4.bias"} <= equal
    assert {"0.weight", "1.weight", "1.bias"}.isdisjoint(equal)


@pytest.mark.parametrize("max_norm", [0.05, 1000.0])
def test_clipping_is_torchs(tmp_path: Path, max_norm: float) -> None:
    engine = make_engine(
        tmp_path, f"train.clip={{kind: norm, max_norm: {max_norm}}}", "optim={kind: sgd, lr: 1}"
    )
    theirs = make_net()
    (make_loss()(theirs, make_batch())[0] / 8).backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    engine.accumulate(make_loss(), make_batch(), 8, last=True)
    torch.testing.assert_close(engine.step().grad_norm, norm)
    for ours, p in zip(engine.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), p.detach() - p.grad, rtol=1e-5, atol=1e-7)


def test_average_follows_its_definition_and_is_what_is_evaluated(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "train.ema=0.75")
    history = []
    for step in range(3):
        engine.accumulate(make_loss(), make_batch(step), 8, last=True)
        engine.step()
        history.append([p.detach().clone() for p in engine.parameters])
    weights = [0.75**2, 0.75, 1.0]  # of the first to the last, whatever came before them not
    expected = [
        sum(w * p for w, p in zip(weights, versions, strict=True)) / sum(weights)
        for versions in zip(*history, strict=True)
    ]
    trained = [p.detach().clone() for p in engine.parameters]
    with engine.evaluating() as model:
        for a, p in zip(expected, model.parameters(), strict=True):
            torch.testing.assert_close(a, p)
    for a, p in zip(trained, engine.parameters, strict=True):
        assert torch.equal(a, p)


def test_learning_rate_follows_applied_steps(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "optim={kind: sgd, lr: 1, schedule: {kind: linear, warmup: 0}}")
    seen = []
    for step in range(4):
        engine.accumulate(
            make_loss(float("inf") if step == 1 else 1.0), make_batch(step), 8, last=True
        )
        engine.step()
        seen.append(engine.lr.item())
    assert seen == pytest.approx([1.0, 0.95, 0.95, 0.9])


def test_the_counter_counts() -> None:
    with HostReads() as reads:
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
    assert reads.count == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_read_nothing_on_the_host(tmp_path: Path, mode: str, optimizer: str) -> None:
    engine = make_engine(
        tmp_path,
        f"optim={OPTIMIZERS[optimizer]}",
        f"precision={MODES[mode]}",
        "train.ema=0.9",
        "train.clip={kind: norm, max_norm: 1.0}",
    )
    with HostReads() as reads:
        for step in range(20):
            engine.accumulate(
                make_loss(float("inf") if step == 5 else 1.0), make_batch(step), 8, last=True
            )
            engine.step()
    assert reads.count == 0


def test_the_model_is_compiled_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    make_engine(tmp_path)
    assert compiled == []
    engine = make_engine(tmp_path, "engine.compile=true")
    for _ in range(2):
        engine.accumulate(make_loss(), make_batch(), 8, last=True)
    assert compiled == [engine.model]


def test_memory_of_the_process_is_in_bytes_and_peaks_are_kept(tmp_path: Path) -> None:
    engine, size = make_engine(tmp_path), 64 << 20
    before, _ = engine.memory()
    assert before > 50e6  # torch alone
    tensor = torch.ones(size, dtype=torch.uint8)
    held, _ = engine.memory()
    del tensor
    after, peak = engine.memory()
    assert 0.9 * size < held - before < 2 * size
    assert after < held
    assert peak >= before + 0.9 * size


@pytest.mark.parametrize("mode", ["fp16-master", "bf16-master"])
def test_the_average_follows_the_masters(tmp_path: Path, mode: str) -> None:
    engine = make_engine(tmp_path, f"precision.mode={mode}", "train.ema=0.5")
    average = [torch.zeros_like(master) for master in engine.masters]
    for step in range(3):
        engine.accumulate(make_loss(), make_batch(step), 8, last=True)
        engine.step()
        average = [a + 0.5 * (m - a) for a, m in zip(average, engine.masters, strict=True)]
    for ours, expected in zip(engine.average, average, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_skipped_steps_do_not_weaken_the_averages_correction(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "train.ema=0.75")
    for factor in (1.0, math.inf, math.inf, math.inf):
        engine.accumulate(make_loss(factor), make_batch(), 8, last=True)
        engine.step()
    trained = [p.detach().clone() for p in engine.parameters]
    with engine.evaluating() as model:  # the average of one step is that step's weights
        for expected, p in zip(trained, model.parameters(), strict=True):
            torch.testing.assert_close(expected, p)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_computes_in_the_types_of_training(tmp_path: Path, mode: str) -> None:
    engine = make_engine(tmp_path, f"precision={MODES[mode]}", "train.ema=0.9")
    engine.accumulate(make_loss(), make_batch(), 8, last=True)
    engine.step()
    assert engine.observed
    with TypesObserver(engine.model) as observer, engine.evaluating() as model:
        model(make_batch()["inputs"])
    for name, types in observer.computed.items():
        assert engine.observed[name].computed == types


@pytest.mark.parametrize("mode", MODES)
def test_frozen_and_unused_parameters_stay_as_they_are(tmp_path: Path, mode: str) -> None:
    model = make_net()
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    engine = make_engine(
        tmp_path, f"precision={MODES[mode]}", "optim={kind: sgd, lr: 0.1}", model=model
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(2):
        engine.accumulate(make_loss(), make_batch(step), 8, last=True)
        assert engine.step().found_inf == 0
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert "4.weight" in changed
    assert changed.isdisjoint({"0.weight", "unused"})
    assert set(engine.state_dict()) == set(model.state_dict())


def test_stochastic_rounding_is_what_the_recipe_asks_for(tmp_path: Path) -> None:
    weights = []
    for overrides in (
        ["precision.mode=bf16-pure"],
        ["precision={mode: bf16-pure, stochastic_rounding: true}"],
        ["precision={mode: bf16-pure, stochastic_rounding: true}", "train.seed=1"],
    ):
        engine = make_engine(tmp_path, *overrides)
        for step in range(2):
            engine.accumulate(make_loss(), make_batch(step), 8, last=True)
            engine.step()
        weights.append(torch.cat([p.detach().flatten() for p in engine.parameters]))
    nearest, stochastic, other_seed = weights
    assert not torch.equal(nearest, stochastic)
    assert not torch.equal(stochastic, other_seed)


def test_adaptive_clipping_measures_the_masters(tmp_path: Path) -> None:
    engine = make_engine(
        tmp_path,
        "precision.mode=bf16-master",
        "optim={kind: sgd, lr: 1}",
        "train.clip={kind: agc, clipping: 0.5}",
    )
    with torch.no_grad():
        engine.masters[0].mul_(1e-3)  # the half weights are as before
    before = engine.masters[0].clone()
    engine.accumulate(make_loss(100.0), make_batch(), 8, last=True)
    engine.step()
    moved = (engine.masters[0] - before).flatten(1).norm(dim=1)
    allowed = 0.5 * before.flatten(1).norm(dim=1).clamp_min(1e-3)
    torch.testing.assert_close(moved, allowed, rtol=1e-3, atol=0.0)


def test_stochastic_rounding_draws_anew_in_each_applied_step(tmp_path: Path) -> None:
    """Two equal updates of half a bf16 step, from the same weights."""
    rounding = "precision={mode: bf16-pure, stochastic_rounding: true}"
    engine = make_engine(tmp_path, rounding, "optim={lr: 1, momentum: 0}", model=HalfStep())
    weight = engine.parameters[0]
    draws = []
    for factor in (1.0, math.inf, 1.0):
        with torch.no_grad():
            weight.fill_(1.0)
        engine.accumulate(half_step_loss(factor), make_batch(), 1, last=True)
        engine.step()
        draws.append(weight.detach().clone())
    first, skipped, second = draws
    assert bool((skipped == 1.0).all())
    assert abs((first == second).double().mean().item() - 0.5) < 0.1


class HalfStep(nn.Module):
    """Its gradient is the same for every weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4096))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight


def half_step_loss(factor: float) -> Any:
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return -(2.0**-8) * factor * model(batch["inputs"]).float().sum(), 1

    return loss


def test_observed_gradients_are_those_of_backward(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "precision.mode=bf16-master")

    def take_away(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in engine.model[4].parameters():  # type: ignore[index,union-attr]
        parameter.register_post_accumulate_grad_hook(take_away)
    engine.accumulate(make_loss(), make_batch(), 8, last=True)
    assert engine.observed
    assert [engine.observed[name].gradient for name in "014"] == ["bf16", "fp32", "-"]
