"""The module that made a step's first NaN or infinity is named, in any step of any loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcli.flight import flights, load_flight
from mpcli.records import FlightRecord
from tests.recorder.conftest import Recording
from tests.recorder.loops import adam, batches, conv_net, fp16, loss_of


class Faulty(nn.Module):
    """x * factor, where `fault` makes what `at` says, once it is switched on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.on = kind, False
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        if not self.on:
            return y
        if self.kind == "forward nan":
            return y * (y - y) / (y - y)
        if self.kind == "forward inf":
            return y * torch.finfo(y.dtype).max * 1e10
        return y + (y * 0.0).abs().sqrt()  # finite, but its derivative at 0 is not


class Net(nn.Module):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3))
        self.faulty = Faulty(kind)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = x + self.drop(block(x))
        return {"logits": self.head(self.faulty(x))}


def flight_of(
    recording: Recording,
    model: Any,
    *,
    loss: Any = lambda logits: logits.square().mean(),
    dtype: torch.dtype = torch.bfloat16,
    wrong: int = 3,
    every: int = 100,
    scaler: Any = None,
) -> FlightRecord:
    """Of a loop of 4 steps whose model, or loss, goes wrong in one of them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = recording.record(model, optimizer, scaler, every=every)
    torch.manual_seed(1)
    for number in range(1, 5):
        model.faulty.on = number == wrong
        x = torch.randn(4, 16)
        with step({"x": x}):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                logits = model(x)["logits"].float()
            value = loss(logits) if number == wrong else logits.square().mean()
            if scaler is None:
                value.backward()
                optimizer.step()
            else:
                scaler.scale(value).backward()
                scaler.step(optimizer)
                scaler.update()
        if number == wrong:
            break
    (found,) = flights(recording.close())
    assert found.step == wrong
    return found


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize(
    ("kind", "phase", "value"),
    [("forward nan", "forward", "nan"), ("forward inf", "forward", "inf")],
)
def test_a_forward_is_named(
    kind: str, phase: str, value: str, every: int, recording: Recording
) -> None:
    found = flight_of(recording, Net(kind), every=every)
    assert found.origin is not None
    assert (found.origin.module, found.origin.phase) == ("faulty", phase)
    assert found.origin.value == value
    assert f"step 3: the first {value} was made by `faulty`, in forward" in recording.caplog.text


def test_a_backward_is_named_though_the_loss_is_finite(recording: Recording) -> None:
    found = flight_of(recording, Net("backward"))
    assert torch.isfinite(torch.tensor(found.loss))
    assert found.origin is not None
    assert (found.origin.module, found.origin.phase) == ("faulty", "backward")


def test_a_loss_that_makes_nan_of_finite_logits_is_named(recording: Recording) -> None:
    found = flight_of(recording, Net(), loss=lambda logits: (logits - 1e6).log().mean())
    assert found.origin is not None
    assert (found.origin.module, found.origin.phase) == ("loss", "forward")


def test_a_loss_that_is_finite_and_whose_gradient_is_not_is_named(recording: Recording) -> None:
    found = flight_of(recording, Net(), loss=lambda logits: (logits * 0.0).abs().sqrt().sum())
    assert found.origin is not None
    assert (found.origin.module, found.origin.phase) == ("loss", "backward")


def test_a_scale_that_is_too_high_for_a_module_is_named_there(recording: Recording) -> None:
    """Only its own products leave the range of fp16, on the way back."""
    model = Net()
    model.blocks[1][0].weight.data.mul_(100)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    found = flight_of(
        recording,
        model,
        loss=lambda logits: logits.sum(),
        dtype=torch.float16,
        wrong=1,
        scaler=scaler,
    )
    assert not found.applied
    assert found.scale == 2.0**14
    assert found.origin is not None
    assert found.origin.phase == "backward"
    assert found.origin.module in ("blocks.1.0", "head")


def test_a_bad_batch_is_named_and_kept(recording: Recording) -> None:
    model = conv_net()
    optimizer = adam(model)
    step = recording.record(model, optimizer)
    for number, (images, labels) in enumerate(batches(2)):
        images[0] *= torch.nan if number else 1.0
        state = torch.get_rng_state()
        with step({"images": images, "labels": labels}):
            optimizer.zero_grad()
            loss_of(model, (images, labels)).backward()
            optimizer.step()
    run = recording.close()
    (found,) = flights(run)
    assert found.origin is not None
    assert found.origin.phase == "input"
    assert "step 2: the model was given a batch that holds nan" in recording.caplog.text
    kept = load_flight(run, 2)
    assert torch.equal(kept["batch.['labels']"], labels)
    assert torch.equal(kept["rng.cpu"], state)


def test_the_same_random_numbers_are_drawn_again(recording: Recording) -> None:
    class Unlucky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.nan if torch.rand(()) < 0.01 else 1.0)

    unlucky = next(s for s in range(1000) if torch.rand((), generator=seeded(s)) < 0.01)
    model = nn.Sequential(nn.Linear(4, 4), Unlucky())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = recording.record(model, optimizer)
    with step(None):
        torch.manual_seed(unlucky)
        model(torch.ones(1, 4)).sum().backward()
        torch.manual_seed(0)
        optimizer.step()
        assert torch.initial_seed() == 0
    (found,) = flights(recording.close())
    assert found.origin is not None
    assert found.origin.module == "1"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_micro_batch_that_went_wrong_is_repeated(recording: Recording) -> None:
    model = Net("forward nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = recording.record(model, optimizer)

    class OnlyNegative(Faulty):
        def forward(self, x: Tensor) -> Tensor:
            self.on = bool((x < -50).any())
            return super().forward(x)

    model.faulty = OnlyNegative("forward nan")
    with step(None):
        for part in (1.0, 1.0, -100.0, 1.0):
            model(torch.full((2, 16), part))["logits"].mean().backward()
        optimizer.step()
    (found,) = flights(recording.close())
    assert found.origin is not None
    assert found.origin.module == "faulty"


def test_gradients_that_overflow_when_they_are_added_up_are_nobody_s(recording: Recording) -> None:
    model = nn.Linear(1, 1, bias=False)
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters()))
    with step(None):
        for _ in range(2):
            model(torch.full((1, 1), 3e38)).sum().backward()
        optimizer.step()
    (found,) = flights(recording.close())
    assert found.origin is None
    assert found.no_origin == "all was finite when it was repeated"


def test_large_gradients_are_not_taken_for_infinite_ones(recording: Recording) -> None:
    """Their squares add up to more than fp32 holds."""
    model = nn.Linear(4, 1, bias=False)
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.0))
    with step(None):
        model(torch.full((1, 4), 1e30)).sum().backward()
        optimizer.step()
    run = recording.close()
    assert flights(run) == []
    assert next(run.steps()).applied


def test_a_loop_that_looks_at_its_loss_and_ends_is_still_explained(recording: Recording) -> None:
    model = Net("forward nan")
    step = recording.record(model, torch.optim.SGD(model.parameters()))
    model.faulty.on = True
    with pytest.raises(ValueError, match="diverged"), step({"x": torch.ones(2, 16)}):
        if model(torch.ones(2, 16))["logits"].mean().isnan():
            raise ValueError("diverged")
    run = recording.close()
    (found,) = flights(run)
    assert found.origin is not None
    assert found.origin.module == "faulty"
    result = run.result()
    assert result is not None
    assert (result.status, result.reason) == ("failed", "ValueError: diverged")


def test_a_loop_that_leaves_a_step_out_by_itself_is_explained(recording: Recording) -> None:
    model = Net("forward nan")
    step = recording.record(model, torch.optim.SGD(model.parameters()))
    model.faulty.on = True
    for _ in range(5):
        with step({"x": torch.ones(2, 16)}):
            loss = model(torch.ones(2, 16))["logits"].mean()
            if loss.isfinite():
                loss.backward()
    found = flights(recording.close())
    assert [(flight.step, flight.origin and flight.origin.module) for flight in found] == [
        *((1, "faulty"), (2, "faulty"), (3, "faulty"))  # it is not searched for ever
    ]


def test_a_step_without_an_update_is_explained_too(recording: Recording) -> None:
    model = Net("backward")
    step = recording.record(model, torch.optim.SGD(model.parameters()))
    model.faulty.on = True
    with step(None):
        model(torch.ones(2, 16))["logits"].sum().backward()
    (found,) = flights(recording.close())
    assert found.origin is not None
    assert (found.origin.module, found.applied) == ("faulty", False)


def test_an_optimizer_that_calls_a_closure_is_recorded(recording: Recording) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    step = recording.record(model, optimizer)
    for factor in (1.0, torch.nan):

        def closure(factor: float = factor) -> Tensor:
            optimizer.zero_grad()
            loss = (model(torch.ones(1, 2)) * factor).square().sum()
            loss.backward()
            return loss

        with step(None):
            optimizer.step(closure)
    run = recording.close()
    assert [row.applied for row in run.steps()] == [True, True]
    (found,) = flights(run)
    assert (found.step, found.no_origin) == (2, "the weights had changed when it was noticed")


def test_skipped_steps_do_not_use_up_the_searches_for_a_loss(recording: Recording) -> None:
    model = Net("forward nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1)
    step = recording.record(model, optimizer, scaler)
    for number in range(6):
        model.faulty.on = number == 5
        with step(None):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                value = model(torch.ones(2, 16))["logits"].float().square().sum()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
    found = flights(recording.close())
    assert [flight.origin is not None for flight in found] == [True] * 3 + [False] * 2 + [True]
    assert found[3].no_origin == "it was looked for in earlier steps already"
    assert found[5].origin is not None
    assert found[5].origin.module == "faulty"


def test_a_model_that_cannot_be_copied_trains_on_and_the_record_says_why(
    recording: Recording,
) -> None:
    model = Net("forward nan")
    inner = model.forward
    model.forward = lambda x: inner(x)  # type: ignore[method-assign]
    found = flight_of(recording, model)
    assert found.origin is None
    assert found.no_origin is not None
    assert "the forward of the model was replaced by a closure" in found.no_origin


def test_a_module_that_keeps_an_activation_is_copied_without_its_graph(
    recording: Recording,
) -> None:
    model = Net("forward nan")
    model.register_forward_hook(lambda m, a, out: setattr(m, "last", out["logits"]))
    found = flight_of(recording, model)
    assert found.origin is not None
    assert found.origin.module == "faulty"


def test_half_a_model_is_repeated_without_the_other_half(recording: Recording) -> None:
    """Only `model` is recorded; the gradients of what stands before it stay as they are."""
    before, model = nn.Linear(16, 16), Net("backward")
    model.faulty.on = True
    optimizer = torch.optim.SGD([*before.parameters(), *model.parameters()], lr=0.0)
    step = recording.record(model, optimizer)
    with step(None):
        model(before(torch.ones(2, 16)))["logits"].sum().backward()
        kept = before.weight.grad
        copy = before.weight.grad.clone()
        optimizer.step()
    assert before.weight.grad is kept
    assert torch.equal(copy.nan_to_num(), kept.nan_to_num())
    (found,) = flights(recording.close())
    assert found.origin is not None
    assert found.origin.module == "faulty"


def test_an_in_place_model_does_not_write_to_the_batch_again(recording: Recording) -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) * self.weight * torch.inf

    model = Doubling()
    step = recording.record(model, optimizer := torch.optim.SGD(model.parameters()))
    x = torch.ones(2)
    with step(None):
        model(x).sum().backward()
        optimizer.step()
    assert torch.equal(x, torch.full((2,), 2.0))
    assert len(flights(recording.close())) == 1


def test_a_compiled_model_is_recorded_from_outside(recording: Recording) -> None:
    model = conv_net()
    compiled = torch.compile(model, backend="eager")
    optimizer = adam(model)
    step = recording.record(compiled, optimizer, every=1)
    for number, (images, labels) in enumerate(batches(3)):
        with step((images, labels)):
            optimizer.zero_grad()
            loss_of(compiled, (images * (torch.nan if number == 2 else 1), labels)).backward()
            optimizer.step()
    run = recording.close()
    about = run.foreign()
    assert about is not None
    assert about.compiled
    (found,) = flights(run)
    assert (found.step, found.no_origin) == (3, "the model is compiled")
    assert [event.event for event in recording.events()] == [
        *("zero_grad", "backward", "optimizer_step")
    ]
    rows = [row for row in run.layers() if row.step == 2]
    assert {row.tensor for row in rows} == {"weight", "grad", "update"}
    assert len(rows) == 3 * len(list(model.parameters()))


def test_the_dynamic_scale_s_search_is_in_the_flights(recording: Recording) -> None:
    fp16(conv_net(), recording.record)
    found = flights(recording.close())
    assert found and not any(flight.applied for flight in found)
    assert all(flight.origin and flight.origin.phase == "backward" for flight in found)
