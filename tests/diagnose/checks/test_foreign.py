"""NaN, infinity and zeros in real loops that are not ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.diagnose.checks.test_loop import only
from tests.recorder.loops import adam, batches, conv_net, fp32, loss_of


class Squared(nn.Module):
    """Squares what a line makes, times `factor`, in the type of the line."""

    def __init__(self, factor: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(36, 3).to(dtype)
        self.factor = factor

    def forward(self, x):
        half = self.line(x.flatten(1).to(self.line.weight.dtype)) * self.factor
        return (half * half).to(torch.promote_types(half.dtype, x.dtype))


def scaled(record, model, *, autocast=torch.float16, init_scale=1024.0, data=None, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    step = record(model, optimizer, scaler)
    for batch in data or batches(steps):
        with step(batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=autocast):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def unscaled(record, model, data=None, optimizer=adam):
    optimizer = optimizer(model)
    step = record(model, optimizer)
    for batch in data or batches():
        with step(batch):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()


def test_an_output_beyond_fp16_is_an_overflow_and_bf16_mends_it(said):
    model = nn.Sequential(nn.Identity(), Squared(1e4))
    found = only(said(lambda record: scaled(record, model), every=1), "forward-overflow")
    assert (found.layers, found.phase, found.step) == (("1",), "forward", 1)
    assert found.suggestion.what.startswith("train in bf16")


def test_of_a_half_module_among_fp32_ones_the_module_is_to_be_fp32(said):
    def model():
        return nn.Sequential(nn.Flatten(), Squared(1e4, torch.float16), nn.Linear(3, 128))

    found = only(said(lambda record: unscaled(record, model()), every=1), "forward-overflow")
    assert (found.layers, found.step) == (("1",), 1)
    assert found.suggestion.what == "compute 1 in fp32"
    again = model()
    exec(found.suggestion.code, {"torch": torch, "model": again})
    assert loss_of(again, next(batches())).isfinite()


class Rooted(nn.Module):
    """The root of a square, whose slope is NaN at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(36, 3)

    def forward(self, x):
        y = self.line(x.flatten(1).float())
        return (y - y.detach()).square().sqrt() + y


@pytest.mark.parametrize("loop", [unscaled, scaled])
def test_a_slope_that_is_not_finite_is_the_module_s(loop, said):
    """A scale that comes down step for step does not hide it."""
    model = nn.Sequential(nn.Identity(), Rooted())
    arguments = {} if loop is unscaled else {"init_scale": 8.0}
    found = only(said(lambda record: loop(record, model, **arguments)), "backward-nonfinite")
    assert (found.layers, found.phase) == (("1",), "backward")
    assert "eps" in [found.suggestion, *found.alternatives][-1].code


def test_nan_of_finite_numbers_in_fp32_is_no_overflow(said):
    class Divided(nn.Linear):
        def forward(self, x):
            y = super().forward(x.flatten(1))
            return y / (y - y)

    found = only(said(lambda record: unscaled(record, Divided(36, 3))), "forward-nonfinite")
    assert (found.layers, found.phase) == (("",), "forward")
    assert found.suggestion.what.startswith("keep the model's own forward away")


def test_a_batch_that_is_not_finite_is_the_batch_s(said):
    data = [(x * (torch.nan if n == 2 else 1), y) for n, (x, y) in enumerate(batches())]
    found = only(said(lambda record: unscaled(record, conv_net(), data)), "bad-batch")
    assert (found.phase, found.step) == ("input", 3)


def test_weights_that_were_not_finite_at_first_are_the_checkpoint_s(said):
    model = conv_net()
    with torch.no_grad():
        model[5].weight[0, 0] = torch.inf
    found = only(said(lambda record: unscaled(record, model)), "bad-checkpoint")
    assert (found.layers, found.step) == (("5",), 1)


def test_weights_that_an_update_made_infinite_are_the_update_s(said):
    def loop(record):
        data = [(x * 1e3, y) for x, y in batches()]
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        unscaled(record, model, data, lambda model: torch.optim.SGD(model.parameters(), lr=1e37))

    found = only(said(loop), "learning-rate")
    assert (found.layers, found.phase, found.step) == (("1",), "update", 1)


def test_a_scale_that_finds_its_level_is_no_fault(said):
    assert said(lambda record: scaled(record, conv_net(), init_scale=2.0**24, steps=12)) == []


def test_gradients_that_a_low_scale_makes_zero_are_found(said):
    found = only(
        said(lambda record: scaled(record, conv_net(), init_scale=2.0**-20), every=1), "underflow"
    )
    assert (found.phase, found.step) == ("backward", 1)
    assert found.evidence["loss scale"] == 2.0**-20
    assert "GradScaler" in found.suggestion.code


def test_gradients_that_all_are_zero_are_found_without_a_sample(said):
    found = only(
        said(lambda record: scaled(record, conv_net(), init_scale=2.0**-40), every=0), "underflow"
    )
    assert found.evidence["steps_without_gradient"] == 4


@pytest.mark.parametrize("scale", [2.0**16, 1024.0, 1.0])
def test_an_ordinary_scale_is_no_fault(scale, said):
    assert said(lambda record: scaled(record, conv_net(), init_scale=scale), every=1) == []


def test_small_gradients_in_fp32_are_no_underflow(said):
    model = conv_net()
    with torch.no_grad():
        model[5].weight.mul_(1e-9)
    assert "underflow" not in {finding.id for finding in said(fp32, model, every=1)}


class Leaves(torch.optim.SGD):
    """Leaves a step out whose gradients are not finite; after its momentum, if it is `spoilt`."""

    def __init__(self, model: nn.Module, spoilt: bool) -> None:
        super().__init__(model.parameters(), lr=0.01, momentum=0.9)
        self.spoilt = spoilt

    def step(self, closure=None):
        weights = [parameter for group in self.param_groups for parameter in group["params"]]
        if all(weight.grad.isfinite().all() for weight in weights):
            return super().step()
        before = [weight.detach().clone() for weight in weights]
        if self.spoilt:
            super().step()
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
        return None


def scaled_by_hand(record, *, called: bool, spoilt: bool = False):
    """A scale that is too high in the second step, and then falls."""
    model, scale = conv_net(), 1024.0
    optimizer = Leaves(model, spoilt)
    step = record(model, optimizer)
    for number, batch in enumerate(batches(6)):
        if number == 1:
            scale = 2.0**30
        with step(batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, batch)
            (loss * scale).backward()
            for parameter in model.parameters():
                parameter.grad.div_(scale)
            is_finite = all(p.grad.isfinite().all() for p in model.parameters())
            if is_finite or called:
                optimizer.step()
            if not is_finite:
                scale = 1024.0


@pytest.mark.parametrize("called", [True, False])
def test_a_loop_that_scales_and_skips_by_hand_is_no_fault(called, said):
    found = said(lambda record: scaled_by_hand(record, called=called), every=1)
    assert [one.id for one in found if one.severity != "info"] == []


def test_momentum_that_a_step_left_out_has_spoilt_is_the_cause(said):
    found = said(lambda record: scaled_by_hand(record, called=True, spoilt=True), every=1)
    assert (found[0].id, found[0].severity, found[0].step) == (
        "optimizer-state-corrupted", "error", 2,
    )  # fmt: skip
