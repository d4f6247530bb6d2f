"""A module's own loss to its number format, beside itself in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcli.precision.local_shadow import LocalShadows
from mpcli.precision.probe import parameter_key
from mpcli.precision.statistics import Samples
from mpcli.records import LayerRecord


def rows_of(
    model: nn.Module, *losses: Any, scale: float | None = None
) -> dict[tuple[str, str], LayerRecord]:
    """Of one step with a backward of each loss, by kind and name."""
    samples = Samples(torch.device("cpu"))
    samples.begin(scale or 1.0)
    shadows = LocalShadows(model, samples, scale or 1.0, lambda hook: hook)
    with shadows.watching():
        for loss in losses:
            value = loss() * (scale or 1.0)
            shadows.before_backward([value], model.parameters(), scaled=scale is not None)
            value.backward()
            shadows.after_backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            shadow = shadows.of_gradient(parameter)
            key = parameter_key(name, "grad")
            samples.add(parameter.grad, key, scaled=scale is not None, shadow=shadow)
    records = samples.finish().records(1, 1)
    assert records is not None
    return {(row.tensor, row.name): row for row in records if row.call == 0}


def half() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.float16)


def test_a_gradient_s_flushed_share_is_known_though_zeros_do_not_tell() -> None:
    """Half of the columns have inputs so small that fp16 products with them are zero."""
    model = nn.Linear(8, 4, bias=False)
    x = torch.ones(1, 8)
    x[0, 4:] = 2.0**-14
    x[0, 0] = 0.0  # a true zero is no loss

    def loss() -> Tensor:
        with half():
            return model(x).float().sum() * 2.0**-12

    row = rows_of(model, loss)["grad", "weight"]
    assert row.zeros == 5 / 8
    assert row.shadow is not None
    assert row.shadow.flushed == 4 / 8
    assert row.shadow.overflowed == 0.0


def test_an_output_that_overflows_is_known() -> None:
    model = nn.Linear(4, 2, bias=False)
    model.weight.data[:] = torch.tensor([[1.0] * 4, [3e4] * 4])

    def loss() -> Tensor:
        with half():
            return model(torch.ones(1, 4)).float()[0, 0]

    row = rows_of(model, loss)["output", ""]
    assert row.inf == 1
    assert row.shadow is not None
    assert row.shadow.overflowed == 0.5


def test_the_error_is_that_of_the_format_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(8, 64)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().square().mean()

    rows = rows_of(model, loss)
    for name in ("0", "1"):
        shadow = rows["output", name].shadow
        assert shadow is not None
        assert 2.0**-11 < shadow.error < 2.0**-7  # bf16 has 8 bits
    shadow = rows["grad", "0.weight"].shadow
    assert shadow is not None
    assert 0 < shadow.error < 2.0**-6


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_scale_and_several_backwards_are_the_same_in_both(scale: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    tokens = torch.randint(9, (3, 4, 5))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)  # of the step before

    def part(number: int) -> Any:
        def loss() -> Tensor:
            with half():
                return model(tokens[number]).float().square().mean()

        return loss

    rows = rows_of(model, part(0), part(1), part(2), scale=scale)
    for name, parameter in model.named_parameters():
        shadow = rows["grad", name].shadow
        if name == "0.weight":
            assert shadow is None  # an embedding has no half tensor: nothing to compare
            continue
        assert shadow is not None, name
        assert shadow.error < 0.01, (name, parameter.shape)


def test_a_weight_that_is_used_past_its_module_claims_nothing() -> None:
    model = nn.Linear(4, 4, bias=False)

    def loss() -> Tensor:
        with half():
            return nn.functional.linear(model(torch.ones(1, 4)), model.weight).float().sum()

    rows = rows_of(model, loss)
    assert rows["grad", "weight"].shadow is None
    assert rows["output", ""].shadow is not None


def test_a_weight_that_two_modules_share_has_the_sum_of_both() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight

    def loss() -> Tensor:
        with half():
            return model(torch.ones(2, 4)).float().square().sum()

    shadow = rows_of(model, loss)["grad", "0.weight"].shadow
    assert shadow is not None
    assert shadow.error < 0.01


def test_what_is_fp32_random_or_in_place_has_no_shadow() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.ReLU(inplace=True))
    rows = rows_of(model, lambda: model(torch.ones(2, 4)).sum())
    assert {row.shadow for row in rows.values()} == {None}
    half_model = model.bfloat16()
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    rows = rows_of(half_model, lambda: half_model(x).float().sum())
    assert rows["output", "0"].shadow is not None
    assert rows["output", "1"].shadow is None
    assert rows["output", "2"].shadow is None


@pytest.mark.parametrize("in_place", [False, True])
def test_an_input_that_was_overwritten_since_claims_nothing_of_the_gradient(in_place: bool) -> None:
    """Autocast multiplied a half copy of it, so torch does not mind."""
    model = nn.Linear(4, 4)

    def loss() -> Tensor:
        x = torch.ones(2, 4)
        with half():
            y = model(x)
        x = x.add_(y) if in_place else x + y
        return x.sum()

    rows = rows_of(model, loss)
    assert (rows["grad", "weight"].shadow is None) == in_place
    assert rows["output", ""].shadow is not None


def test_the_module_itself_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    twin = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 1, 6, 6)
    random = torch.get_rng_state()
    for each in (model, twin):

        def loss(each: nn.Module = each) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return each(x).float().square().mean()

        rows_of(each, loss) if each is model else loss().backward()
    assert torch.equal(torch.get_rng_state(), random)
    for (name, value), other in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_recurrent_module_has_rows_and_no_shadow() -> None:
    model = nn.GRU(4, 4).bfloat16()
    x = torch.ones(3, 1, 4, dtype=torch.bfloat16)
    rows = rows_of(model, lambda: model(x)[0].float().sum())
    assert rows["output", ""].shadow is None
    assert rows["grad", "weight_ih_l0"].shadow is None
