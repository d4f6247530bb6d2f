"""The prediction against direct rounding to fp16."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpcli.precision.statistics import SAMPLED, Key, Samples
from mpcli.sweep.evidence import histogram_of
from mpcli.sweep.prediction import SCALES, Prediction, _rounded_energy
from mpcli.sweep.recommendation import LossScaleSweep
from mpcli.sweep.results import Fractions, GradientHistogram
from tests.sweep import tiny_gradients
from tests.sweep.test_recommendation import reference


def histogram(values: Tensor, name: str = "layer.weight") -> GradientHistogram:
    return histogram_of_tensor(values, Key("layer", "grad", name))


def histogram_of_tensor(values: Tensor, key: Key) -> GradientHistogram:
    samples = Samples(values.device)
    samples.begin(1.0)
    samples.add(values, key)
    return histogram_of(samples.finish().records(1, 1) or [])


def rounded(values: Tensor, scale: float) -> Fractions:
    """What fp16 makes of each value, counted."""
    scaled = values.double() * scale  # exact: fp16 rounds once
    half = scaled.half()
    there = values != 0
    count = int(there.sum())
    zero = there & (half == 0)
    infinite = there & half.isinf()
    subnormal = there & ~zero & (scaled.abs() < 2.0**-14)
    return Fractions(
        underflow=int(zero.sum()) / count,
        subnormal=int(subnormal.sum()) / count,
        overflow=int(infinite.sum()) / count,
    )


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Values over many binades, with zeros, of which none is a power of two."""
    seed = draw(st.integers(0, 2**32 - 1))
    middle, spread = draw(st.integers(-60, 20)), draw(st.floats(0.1, 20))
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randn(500, generator=generator, dtype=torch.float64) * spread + middle
    values = (2**powers).float().clamp(2.0**-120, 2.0**100)
    values[: draw(st.integers(0, 400))] = 0.0
    mantissas, _ = torch.frexp(values)
    return torch.where(mantissas == 0.5, values * 1.25, values)


@given(values=tensors(), power=st.integers(-8, 32))
def test_a_power_of_two_is_predicted_as_direct_rounding_does_it(values: Tensor, power: int) -> None:
    predicted, direct = (
        Prediction([histogram(values)]).total(2.0**power),
        rounded(values, 2.0**power),
    )
    assert predicted.underflow == pytest.approx(direct.underflow, abs=1e-12)
    assert predicted.subnormal == pytest.approx(direct.subnormal, abs=1e-12)
    # The bin that ends at 2^16 is cut at 65520, a thousandth of a bin below.
    assert (predicted.overflow > 0) == (direct.overflow > 0)
    assert predicted.overflow == pytest.approx(direct.overflow, abs=4e-3)


@given(values=tensors(), weights=tensors(), scales=st.tuples(*[st.floats(2.0**-8, 2.0**32)] * 2))
def test_more_scale_loses_no_more_and_overflows_no_less(
    values: Tensor, weights: Tensor, scales: tuple[float, float]
) -> None:
    outputs = histogram(values, "layer").model_copy(update={"tensor": "grad_output"})
    prediction = Prediction([outputs, histogram(weights)])
    low, high = (prediction.total(scale) for scale in sorted(scales))
    assert high.underflow <= low.underflow + 1e-12
    assert high.overflow >= low.overflow - 1e-12
    for one in (low, high):
        assert min(one.underflow, one.subnormal, one.overflow) >= 0
        assert one.underflow + one.subnormal + one.overflow <= 1 + 1e-9


def test_between_powers_of_two_a_bin_is_cut_in_proportion() -> None:
    values = 2 ** (torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 12 - 30)
    for scale in (1.5, 3.0, 7.0):
        predicted = Prediction([histogram(values)]).total(scale)
        assert predicted.underflow == pytest.approx(rounded(values, scale).underflow, abs=0.01)
        assert predicted.subnormal == pytest.approx(rounded(values, scale).subnormal, abs=0.01)


def test_a_tie_is_counted_as_kept_though_fp16_rounds_it_to_zero() -> None:
    """The one case that exponents do not tell: the value is 2^-25 exactly."""
    values = torch.full((4,), 2.0**-25)
    assert rounded(values, 1.0).underflow == 1.0
    assert Prediction([histogram(values)]).total(1.0).underflow == 0.0


def test_the_largest_element_counts_where_it_was_not_sampled() -> None:
    values = torch.full((4 * SAMPLED,), 2.0**-3 * 1.1)
    unsampled = next(
        index
        for index in range(len(values))
        if histogram(torch.arange(len(values)).eq(index).float()).zeros == 1.0
    )
    values[unsampled] = 2000.0
    prediction = Prediction([histogram(values)])
    assert prediction.largest_scale == 32.0
    assert prediction.total(32.0).overflow == 0.0
    assert prediction.total(64.0).overflow == pytest.approx(1 / len(values))


@pytest.mark.parametrize(("largest", "top"), [(65519.0, 1.0), (65520.0, 0.5), (1.0, 2.0**15)])
def test_the_limit_is_where_fp16_rounds_to_infinity(largest: float, top: float) -> None:
    assert Prediction([histogram(torch.tensor([largest]))]).largest_scale == top
    assert math.isfinite(torch.tensor(largest * top).half().item())


def test_tensors_count_by_their_values_that_are_not_zero() -> None:
    lost, kept = torch.full((300,), 2.0**-30 * 1.1), torch.full((1000,), 1.1)
    kept[100:] = 0.0
    prediction = Prediction([histogram(lost, "lost"), histogram(kept, "kept")])
    assert prediction.total(1.0).underflow == pytest.approx(300 / 400)
    assert [layer.fractions.underflow for layer in prediction.layers(1.0)] == [1.0, 0.0]


@pytest.mark.parametrize("lowest", [-26.0, -25.4, -25.0, -24.3, -24.0, -22.0, -18.0])
def test_rounding_takes_energy_away_and_adds_some(lowest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 2 ** (lowest + torch.rand(200_000, generator=generator, dtype=torch.float64))
    direct = values.half().double().square().mean() / values.square().mean()
    assert _rounded_energy(np.array([lowest])) == pytest.approx(direct.item(), abs=0.01)


def test_a_weights_gradient_follows_what_rounding_makes_of_its_modules_output() -> None:
    weights = histogram(torch.full((50,), 2.0**-25 * 1.1), "layer.weight")
    normal = histogram(torch.full((50,), 2.0**-14 * 1.1), "layer.weight")

    def behind(
        weights: GradientHistogram, *outputs: tuple[int, float], scale: float = 1.0
    ) -> Fractions:
        values = torch.cat([torch.full((number,), value * 1.5) for number, value in outputs])
        output = histogram(values, "layer").model_copy(update={"tensor": "grad_output"})
        first, second = Prediction([output, weights]).layers(scale)
        assert first.tensor == "grad_output"
        return second.fractions

    assert Prediction([weights]).layers(1.0)[0].fractions.underflow == 0.0
    # Of the bin from 2^-24 on, three in two become 2^-24 and the rest 2^-23.
    rounded = (math.log2(1.5) + 4 * math.log2(4 / 3)) / (3 / (2 * math.log(2)))
    kept = rounded * 16 * 100 / (16 * 100 + 300)  # 300 are lost
    # Spread over their bin, those below 1 / sqrt(kept) are lost.
    outputs = (300, 2.0**-26), (100, 2.0**-24)
    assert behind(weights, *outputs).underflow == pytest.approx(-math.log2(kept) / 2)
    assert behind(normal, *outputs).subnormal == pytest.approx(-math.log2(kept) / 2)
    assert behind(weights, *outputs, scale=0.1).underflow == 1.0
    # All of an output are rounded up: its weights' gradients grow, and half a scale is enough.
    assert 0 < behind(weights, (9, 2.0**-24), scale=0.5).underflow < 0.6
    assert Prediction([weights]).layers(0.5)[0].fractions.underflow == 1.0


class Rounded(torch.autograd.Function):
    """The gradient in fp16, rounded once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.half().float()


def gradients(seed: int, scale: float, half: bool) -> dict[Key, Tensor]:
    """Of a stack of convolutions without norms, whose loss is multiplied by 1e-4.

    Args:
        half: whether every gradient is rounded to fp16 when it is ready; all sums are in fp32.
    """
    torch.manual_seed(seed)
    options = tiny_gradients.Options(kind="plugin")
    model = tiny_gradients.build_model(options, 10)
    data = tiny_gradients.load_data(options, None)
    data.prepare(torch.device("cpu"))
    batch = data.train_batch(seed, 0, 16)
    values, targets = batch["images"], batch["targets"]
    found: dict[Key, Tensor] = {}
    for name, layer in model.named_children():
        values = layer(values)
        values.register_hook(
            lambda grad, name=name: found.update({Key(name, "grad_output", name): grad})
        )
        if half:
            values = Rounded.apply(values)
    (F.cross_entropy(values, targets) * options.factor * scale).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[Key(name.partition(".")[0], "grad", name)] = parameter.grad
    return found


def test_where_fp16_rounds_once_a_plain_stack_loses_what_is_predicted() -> None:
    """At scales that lose from 4% to two thirds of all values, in total and of each layer."""
    for seed in range(3):
        exact = gradients(seed, 1.0, half=False)
        prediction = Prediction([histogram_of_tensor(values, key) for key, values in exact.items()])
        for scale in (1.0, 4.0, 16.0, 64.0):
            half = {key: grad.half() for key, grad in gradients(seed, scale, half=True).items()}
            there = {key: values != 0 for key, values in exact.items()}
            lost = {key: int((there[key] & (half[key] == 0)).sum()) for key in exact}
            total = sum(lost.values()) / sum(int(one.sum()) for one in there.values())
            assert prediction.total(scale).underflow == pytest.approx(total, rel=0.1)
            for layer in prediction.layers(scale):
                if layer.elements > 1000:
                    key = Key(layer.module, layer.tensor, layer.name)
                    measured = lost[key] / int(there[key].sum())
                    within = 0.04 if scale > 1 else 0.15  # without the outputs' energy: 0.36
                    assert layer.fractions.underflow == pytest.approx(measured, abs=within), key


def test_where_an_output_loses_all_the_weights_gradient_is_zero() -> None:
    output = histogram(torch.full((9,), 2.0**-40), "layer")
    weight = histogram(torch.full((9,), 2.0**-10), "layer.weight")
    lost = output.model_copy(update={"tensor": "grad_output"})
    assert [one.fractions.underflow for one in Prediction([lost, weight]).layers(1.0)] == [1, 1]


def test_nothing_but_zeros_predicts_nothing() -> None:
    for prediction in (Prediction([]), Prediction([histogram(torch.zeros(3))])):
        assert prediction.total(1.0).underflow == 0.0
        assert prediction.layers(1.0) == ()
        assert prediction.largest_scale == SCALES[-1]


def multibox() -> Tensor:
    """Like the activation gradients of Multibox SSD in Micikevicius et al. (2018), figure 3.

    66.8% are zero in fp32; a further 31% are in [2^-28, 2^-25), which fp16 loses.
    """
    generator = torch.Generator().manual_seed(0)
    small = 2 ** (torch.rand(3100, generator=generator) * 3 - 28)
    large = 2 ** (torch.rand(220, generator=generator) * 10 - 25) * 1.001
    return torch.cat([torch.zeros(6680), small, large])


def test_the_papers_case_has_its_knee_at_8() -> None:
    values = multibox()
    prediction = Prediction([histogram(values)])
    assert (values == 0).float().mean() == pytest.approx(0.668)
    lost = prediction.total(1.0).underflow * (1 - 0.668)  # of all values
    assert lost == pytest.approx(0.31, abs=0.001)
    assert LossScaleSweep([reference(histogram(values))]).knee == 8.0
    assert rounded(values, 8.0).underflow <= 0.01 < rounded(values, 4.0).underflow
