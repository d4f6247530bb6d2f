"""The verdict over weights: fp16, bf16, or some layers in fp32."""

from __future__ import annotations

import pytest
import torch

from mpcli.diagnose.statics import examine
from mpcli.diagnose.verdict import fits, judge, layer_of

ORDINARY = examine(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.02)
TOO_LARGE = examine(torch.full((100,), 1e5))
TOO_SMALL = examine(torch.full((100,), 1e-9))
TOO_COARSE = examine(torch.rand(100, generator=torch.Generator().manual_seed(0)) * 1e-6)
BEYOND_BF16 = examine(torch.full((100,), 3.4e38))


def test_ordinary_weights_fit_fp16():
    assert judge({"a": ORDINARY, "b": ORDINARY}).text == "fits fp16"


@pytest.mark.parametrize("layer", [TOO_LARGE, TOO_SMALL, TOO_COARSE])
def test_a_small_layer_that_fp16_cannot_hold_is_named(layer):
    assert not fits(layer, "fp16")
    assert fits(layer, "bf16")
    found = judge({"a": ORDINARY, "b.scale": layer})
    assert found.text == "needs these layers in fp32: [b.scale] (and fp16 for the others)"
    assert (found.dtype, found.fp32_layers) == ("fp16", ("b.scale",))


def test_where_fp16_cannot_hold_most_of_the_values_bf16_is_needed():
    small = examine(torch.ones(50))
    assert judge({"a": TOO_LARGE, "b": small}).text == "needs bf16"


def test_what_bf16_cannot_hold_either_is_named():
    found = judge({"a": TOO_LARGE, "b": BEYOND_BF16})
    assert found.text == "needs these layers in fp32: [b] (and bf16 for the others)"
    assert judge({"a": BEYOND_BF16}).text == "needs these layers in fp32: [a]"


def test_a_single_value_that_overflows_is_enough():
    assert not fits(ORDINARY + examine(torch.tensor([65520.0])), "fp16")
    assert fits(ORDINARY + examine(torch.tensor([65519.0])), "fp16")


def test_small_values_that_become_zero_beside_others_are_no_reason_until_they_are_many():
    assert fits(ORDINARY + examine(torch.full((110,), 1e-12)), "fp16")
    assert not fits(ORDINARY + examine(torch.full((112,), 1e-12)), "fp16")


def test_values_that_are_not_finite_say_nothing_of_a_format():
    assert judge({"a": ORDINARY + examine(torch.tensor([torch.nan, torch.inf]))}).dtype == "fp16"


def test_of_many_layers_the_first_are_named():
    layers = {f"layer.{number}": TOO_LARGE for number in range(30)}
    found = judge(layers | {"ordinary": examine(torch.ones(10_000))})
    assert len(found.fp32_layers) == 30
    assert "layer.19, and 10 more] (and fp16 for the others)" in found.text


def test_zeros_fit_everything_and_of_nothing_nothing_is_said():
    assert judge({"a": examine(torch.zeros(4))}).text == "fits fp16"
    assert judge({}) == ("no finite values", None, ())


def test_the_layer_of_a_tensor_is_the_module_that_has_it():
    assert layer_of("encoder.0.weight") == "encoder.0"
    assert layer_of("weight") == "weight"
