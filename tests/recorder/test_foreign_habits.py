"""What people's loops and models do that a recorder could trip over, or change."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpcli.cli.evidence import origin_text
from mpcli.flight import flights, load_flight
from mpcli.precision.local_shadow import LocalShadows
from mpcli.recipe.errors import Exit, UserError
from mpcli.recorder import Recorder
from mpcli.records import LayerRecord
from tests.recorder.conftest import Recording
from tests.recorder.loops import adam, unrecorded

Loop = Callable[[Any], nn.Module]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def skipping(model: nn.Module, record: Any, steps: int = 4) -> nn.Module:
    """fp16 with a scale that is too high at first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-14)
    step = record(model, optimizer, scaler)
    for number in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        with step(x):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return model


def random_states() -> tuple[Any, ...]:
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2:]


def assert_unchanged(loop: Loop, recording: Recording, every: int = 1) -> None:
    """Weights, and the random numbers of torch, Python and NumPy."""
    ends = []
    for record in (unrecorded, lambda *args: recording.record(*args, every=every)):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        ends.append((loop(record).state_dict(), random_states()))
    (alone, random_alone), (recorded, random_recorded) = ends
    assert random_recorded == random_alone
    for name, value in alone.items():
        assert torch.equal(value, recorded[name]), name
    recording.close()


class DrawsElsewhere(nn.Module):
    """Leaves a layer out by Python's random numbers, and adds NumPy's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        factor = 2.0 if random.random() < 0.5 else 1.0
        return x * factor + torch.tensor(np.random.rand())


def test_random_numbers_of_python_and_numpy_are_drawn_once(recording: Recording) -> None:
    assert_unchanged(lambda record: skipping(DrawsElsewhere(), record), recording)
    assert flights(recording.close())[0].origin is not None  # it was repeated


def test_random_numbers_of_python_are_the_same_when_a_forward_is_repeated(
    recording: Recording,
) -> None:
    class Unlucky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (torch.nan if random.random() < 0.01 else 1.0)

    model = nn.Sequential(nn.Linear(4, 4), Unlucky(4, 4))
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters()))
    random.seed(next(seed for seed in range(1000) if random.Random(seed).random() < 0.01))
    with step(None):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    (found,) = flights(recording.close())
    assert found.origin is not None
    assert found.origin.module == "1"


def test_somebody_s_hook_runs_once_for_each_forward(recording: Recording) -> None:
    def loop(record: Any) -> nn.Module:
        model, centre = mlp(), torch.zeros(16)

        def move(module: nn.Module, args: Any, output: Tensor) -> None:
            centre.mul_(0.9).add_(output.detach().float().mean(0), alpha=0.1)

        model[0].register_forward_hook(move)
        skipping(model, record)
        model.register_buffer("centre", centre)
        return model

    assert_unchanged(loop, recording)


def test_what_a_hook_made_is_not_blamed_on_the_loss(recording: Recording) -> None:
    model = mlp()
    model[1].register_forward_hook(lambda module, args, output: output * torch.nan)
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters()))
    with step(None):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    (found,) = flights(recording.close())
    assert found.origin is None
    assert found.no_origin is not None
    assert "without the hooks of others" in found.no_origin


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_torch_s_own_hook_makes_is_made_again(recording: Recording) -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 4)), nn.Linear(4, 1))
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters()))
    with step(None):
        (model(torch.ones(2, 8)) * torch.inf).sum().backward()
        optimizer.step()
    (found,) = flights(recording.close())
    assert found.origin is not None
    assert found.origin.module == "loss"


def test_a_module_that_draws_random_numbers_draws_them_once(recording: Recording) -> None:
    class Noise(nn.Module):  # one that nobody listed
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    Noise.__module__ = "torch.nn.modules.noise"

    def loop(record: Any) -> nn.Module:
        model = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), Noise(), nn.FractionalMaxPool2d(2, output_size=4)),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3)),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = record(model, optimizer)
        for _ in range(3):
            with step(None):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(torch.randn(4, 1, 12, 12)).float().square().mean()
                loss.backward()
                optimizer.step()
        return model

    assert_unchanged(loop, recording)
    rows = {row.module: row for row in recording.close().layers() if row.tensor == "output"}
    assert rows["1"].shadow is not None  # as of any module of torch's
    assert rows["2"].shadow is None


def compiled(record: Any) -> nn.Module:
    """A compiled function around a model that is not."""
    torch._dynamo.reset()
    model = mlp()
    function = torch.compile(lambda x: model(x).square().mean(), backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = record(model, optimizer)
    for number in range(12):
        x = torch.randn(4, 8) * (torch.nan if number == 11 else 1.0)
        with step(x):
            optimizer.zero_grad()
            function(x).backward()
            if number < 11:
                optimizer.step()
    return model


def test_a_compiled_function_around_a_model_stays_compiled(recording: Recording) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    assert_unchanged(compiled, recording)
    assert (
        counters["frames"]["ok"] <= 3
    )  # once alone; recorded, with the hook of step 1 and without
    run = recording.close()
    assert {event.event for row in run.events() for event in row.events} == {
        *("zero_grad", "backward", "optimizer_step")
    }
    (found,) = flights(run)
    assert found.no_origin == "the model is compiled"


def compiled_inside(record: Any) -> nn.Module:
    """A forward that is not compiled calls a compiled function around a part of the model."""
    torch._dynamo.reset()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return function(self.inner, x)

    function = torch.compile(lambda inner, x: inner(x).square().mean(), backend="eager")
    model = Outer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = record(model, optimizer)
    for _ in range(12):
        with step(None):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).backward()
            optimizer.step()
    return model


def test_a_compiled_function_inside_of_a_model_is_not_compiled_in_every_step(
    recording: Recording,
) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    assert_unchanged(compiled_inside, recording, every=0)
    assert counters["frames"]["ok"] <= 3


def per_sample(record: Any) -> nn.Module:
    from torch.func import functional_call, grad, vmap

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = record(model, optimizer)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).square().mean()

    for _ in range(2):
        with step(None):
            parameters = {name: p.detach() for name, p in model.named_parameters()}
            found = vmap(grad(loss), in_dims=(None, 0))(parameters, torch.randn(4, 8))
            for name, parameter in model.named_parameters():
                parameter.grad = found[name].mean(0)
            optimizer.step()
    return model


class ToSparse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse()


def sparse(record: Any) -> nn.Module:
    model = nn.ModuleDict({"sparse": ToSparse(), "line": nn.Linear(8, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = record(model, optimizer)
    for _ in range(2):
        with step(None):
            x = model["sparse"](torch.randn(4, 8).relu())
            torch.sparse.mm(x, model["line"].weight.t()).square().mean().backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("loop", [per_sample, sparse])
def test_unusual_tensors_are_passed_over(loop: Loop, recording: Recording) -> None:
    assert_unchanged(loop, recording)  # nor is anything logged as an error
    assert {row.tensor for row in recording.close().layers()} >= {"weight", "grad", "update"}


@pytest.mark.parametrize(
    "broken", ["_after_forward", "_add_gradients", "_of_gradient", "before_backward"]
)
def test_a_failure_in_a_shadow_ends_no_training(
    broken: str, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug of the recorder")

    monkeypatch.setattr(LocalShadows, broken, fail)
    skipping(mlp(), lambda *args: recording.record(*args, every=1))
    assert "a bug of the recorder" in recording.caplog.text
    recording.caplog.clear()


@pytest.mark.parametrize("broken", ["_enter_module", "_leave_module"])
def test_a_failure_in_observing_ends_no_training(
    broken: str, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug of the recorder")

    monkeypatch.setattr(f"mpcli.precision.observe.TypesObserver.{broken}", fail)
    skipping(mlp(), recording.record)
    assert "a bug of the recorder" in recording.caplog.text
    recording.caplog.clear()


def test_an_average_made_in_a_step_is_not_observed_later(recording: Recording) -> None:
    import copy

    model = mlp()
    step = recording.record(model, optimizer := adam(model), every=1)
    with step(None):
        loss = model(torch.ones(2, 8)).sum()
        average = copy.deepcopy(model)
        loss.backward()
        optimizer.step()
    average(torch.ones(2, 8)).sum().backward()
    with step(None):
        average(torch.ones(2, 8)).sum().backward()
    recording.close()


class Mine:
    """An optimizer that is none of torch's."""

    def __init__(self, parameters: Iterator[Tensor]) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]


@pytest.mark.parametrize(
    ("model", "optimizer", "what"),
    [
        (mlp(), Mine(mlp().parameters()), "takes a torch.optim.Optimizer, not a Mine"),
        (len, adam(mlp()), "takes a torch.nn.Module"),
        (nn.Sequential(nn.LazyLinear(4)), adam(mlp()), "0.weight has no shape yet"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    model: Any, optimizer: Any, what: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=what) as refused:
        Recorder(model, optimizer, out=tmp_path / "run")
    assert refused.value.exit_code == Exit.USAGE
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused_in_the_words_of_python(tmp_path: Path) -> None:
    model = mlp()
    Recorder(model, adam(model), out=tmp_path / "run").close()
    with pytest.raises(UserError, match=r"out=.*run: the folder is not empty") as refused:
        Recorder(model, adam(model), out=tmp_path / "run")
    assert "the time in its name" in str(refused.value.problems)


def test_a_folder_that_is_gone_ends_no_loop(recording: Recording) -> None:
    model = mlp()
    step = recording.record(model, optimizer := adam(model), every=1)
    for number in range(3):
        if number == 1:
            shutil.rmtree(recording.path)
        with step(None):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
    assert recording.recorder is not None
    recording.recorder.close()
    assert "the end of the record was lost" in recording.caplog.text
    recording.recorder = None


class Leaf(nn.Module):
    """Returns a parameter through a module, and the model another one."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.same = nn.Identity()

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.same(self.token) * 2, self.head


def test_no_hook_stays_on_a_parameter(recording: Recording) -> None:
    model = Leaf()
    step = recording.record(model, optimizer := adam(model), every=2)
    for _ in range(4):
        with step(None):
            optimizer.zero_grad()
            one, other = model()
            (one + other).sum().backward()
            optimizer.step()
    assert not model.token._backward_hooks and not model.head._backward_hooks
    seen = {row.name for row in recording.close().layers() if row.tensor == "grad_output"}
    assert seen == {""}  # the sum over other uses of a parameter is not a gradient of the output


def test_hooks_on_activations_are_gone_after_a_step(recording: Recording) -> None:
    model = mlp()
    step = recording.record(model, adam(model), every=1)
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with step(None):
        output = model(torch.ones(2, 8))
        output.sum().backward()
    for tensor in (output, *kept):
        assert not tensor._backward_hooks


def rows(recording: Recording, kind: str) -> list[LayerRecord]:
    return [row for row in recording.close().layers() if row.tensor == kind]


def test_a_gradient_penalty_adds_no_row_twice(recording: Recording) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    step = recording.record(model, optimizer := adam(model), every=1)
    x = torch.randn(4, 8, requires_grad=True)
    with step(None):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x).float()
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (output.mean() + gradient.square().mean()).backward()
        optimizer.step()
    found = rows(recording, "grad_output")
    assert len({(row.name, row.call) for row in found}) == len(found) == 3
    last = next(row for row in found if row.name == "2")
    assert last.max == pytest.approx(0.25)  # of the mean, not the 1 of the sum


def test_weights_that_are_not_finite_are_named_and_use_up_no_search(recording: Recording) -> None:
    model = mlp()
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))

    def one(factor: float = 1.0) -> None:
        with step(None):
            optimizer.zero_grad()
            (model(torch.ones(2, 8)) * factor).sum().backward()
            optimizer.step()

    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    for _ in range(4):
        one()
    model.load_state_dict(mlp().state_dict())
    one(torch.nan)
    found = flights(recording.close())
    for flight in found[:4]:
        assert flight.origin is not None
        assert (flight.origin.module, flight.origin.operation) in [
            ("2", "weights"),
            ("0", "weights"),
        ]
    assert found[0].origin is not None
    assert origin_text(found[0].origin) == "nan in the weights of 2, before the step"
    assert found[4].origin is not None and found[4].origin.module == "loss"
    assert recording.caplog.text.count("the weights of `2` are not finite before it") == 1


def test_a_sparse_tensor_of_the_batch_is_left_out_of_the_flight(recording: Recording) -> None:
    model = mlp()
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters()))
    x = torch.full((4, 8), torch.inf)
    with step({"x": x, "graph": torch.eye(4).to_sparse()}):
        model(x).sum().backward()
        optimizer.step()
    run = recording.close()
    assert [flight.step for flight in flights(run)] == [1]
    assert {name for name in load_flight(run, 1) if name.startswith("batch")} == {"batch.['x']"}


@pytest.mark.parametrize("place", ["fp16 deep inside", "half weights"])
def test_what_fp16_flushed_already_is_not_counted_again(place: str, recording: Recording) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor) -> Tensor:
            if place == "half weights":
                return self.layers(x.half())
            with torch.autocast("cpu", dtype=torch.float16):
                return self.layers(x)

    model = nn.Sequential(nn.Sequential(Inside()))
    if place == "half weights":
        model.half()
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters()))
    with step(None):
        (model(torch.ones(2, 8)).float().sum() * 1e-9).backward()
        optimizer.step()
    assert {row.zeros for row in rows(recording, "grad")} == {1.0}
    assert {row.would_flush for row in rows(recording, "grad")} == {None}
    forward = next(event for event in recording.events() if event.event == "forward")
    assert forward.autocast == ("off" if place == "half weights" else "fp16")


def test_through_fp16_is_known_from_the_weights_alone(recording: Recording) -> None:
    """Nothing that a module returns is fp16."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Parameter(torch.ones(8, dtype=torch.float16))

        def forward(self, x: Tensor) -> Tensor:
            return (x.half() * self.inner).float()

    model = nn.Sequential(nn.Linear(8, 8), Through())
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters()))
    with step(None):
        (model(torch.ones(2, 8)).sum() * 1e-9).backward()
        optimizer.step()
    assert {row.would_flush for row in rows(recording, "grad")} == {None}


def test_zeroed_gradients_in_place_do_not_hide_lost_updates(recording: Recording) -> None:
    model = mlp().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    step = recording.record(model, optimizer)
    with step(None):
        model(torch.randn(4, 8).bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert {row.lost for row in rows(recording, "update") if row.name.endswith("weight")} == {1.0}
