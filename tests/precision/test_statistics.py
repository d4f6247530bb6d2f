"""Statistics of tensors against an exact reference in double precision."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpcli.precision import statistics
from mpcli.precision.statistics import SAMPLED, Key, Kind, Samples
from mpcli.records import LayerRecord
from tests.host_reads import HostReads

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("output", "grad_output", "weight", "grad", "update")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EDGES = [  # where something begins or ends
    *(0.0, -0.0, 2.0**-25, math.nextafter(2.0**-25, 1), 2.0**-24, 2.0**-14, 65519.0, 65504.0),
    *(65520.0, 65536.0, 2.0**-126, 2.0**-149, 1.5, -3.0, math.inf, -math.inf, math.nan, 3e38),
]


def record(
    tensor: Tensor, kind: Kind = "output", *, on_host: bool = True, **about: Any
) -> LayerRecord:
    samples = Samples(tensor.device, on_host=on_host, through_fp16=about.pop("through_fp16", False))
    samples.begin(about.pop("scale", 1.0))
    samples.add(tensor, Key("layer", kind, "layer"), **about)
    (row,) = samples.finish().records(7, 1) or []
    return row


class Reference:
    """The same numbers, the slow and certain way: every element as a Python float."""

    def __init__(self, tensor: Tensor) -> None:
        self.values = [abs(value) for value in tensor.double().reshape(-1).tolist()]
        self.finite = [value for value in self.values if math.isfinite(value)]
        self.dtype = tensor.dtype

    def share(self, condition: Any) -> float:
        return sum(map(bool, map(condition, self.values))) / len(self.values)

    @property
    def max(self) -> float:
        return max([value for value in self.values if not math.isnan(value)], default=0.0)

    @property
    def rms(self) -> float:
        squares = sum(Fraction(value) ** 2 for value in self.finite)
        return math.sqrt(squares / len(self.finite)) if self.finite else 0.0

    @property
    def exponents(self) -> Counter[int]:
        powers = (math.frexp(value)[1] - 1 for value in self.finite if value)
        return Counter(max(power, -127) for power in powers)  # fp32's subnormals are one bin

    @property
    def shares(self) -> dict[str, float]:
        tiny = torch.finfo(self.dtype).tiny
        return {
            "zeros": self.share(lambda x: x == 0),
            "at_least_65520": self.share(lambda x: x >= 65520),
            "subnormal": self.share(lambda x: 0 < x < tiny),
            "would_flush": self.share(lambda x: 0 < x <= 2.0**-25),
        }


def exponents(row: LayerRecord) -> dict[int, int]:
    lowest = row.lowest_exponent or 0
    return {lowest + number: count for number, count in enumerate(row.exponents) if count}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    floats = st.floats(width=32) | st.sampled_from(EDGES)
    values = draw(st.lists(floats, min_size=1, max_size=60))
    return torch.tensor(values, dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("on_host", [True, False])
@given(tensor=tensors(), kind=st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_of_a_small_tensor_everything_is_exact(tensor: Tensor, kind: Kind, on_host: bool) -> None:
    row, reference = record(tensor, kind, on_host=on_host), Reference(tensor)
    assert (row.elements, row.sampled) == (len(tensor), len(tensor))
    assert row.max == reference.max
    assert row.nan == sum(map(math.isnan, reference.values))
    assert row.inf == sum(map(math.isinf, reference.values))
    assert row.rms == pytest.approx(reference.rms, rel=1e-6, abs=1e-46)
    assert exponents(row) == dict(reference.exponents)
    for name, share in reference.shares.items():
        if name == "would_flush" and tensor.dtype == torch.float16:
            assert row.would_flush is None  # what fp16 flushed is gone
        else:
            assert getattr(row, name) == share, name


def distributions(kind: Kind) -> list[Tensor]:
    """Six large tensors of a kind, as runs have them."""
    torch.manual_seed(KINDS.index(kind))
    normal = torch.randn(32, 24, 5, 7)
    spoilt = normal.clone()
    spoilt.view(-1)[torch.randperm(normal.numel())[:40]] = math.nan
    spoilt.view(-1)[torch.randperm(normal.numel())[:30]] = math.inf
    return [
        normal.relu(),
        normal * 2.0**-25,
        torch.exp2(normal * 12),
        normal * 40000,
        spoilt,
        torch.where(torch.rand_like(normal) < 1e-4, 7e4, normal),
    ]


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_large_tensor_the_extremes_are_exact_and_the_shares_within_their_error(
    kind: Kind, dtype: torch.dtype, on_host: bool
) -> None:
    for tensor in distributions(kind):
        for laid_out in (tensor, tensor.to(memory_format=torch.channels_last), tensor.mT):
            given_ = laid_out.to(dtype)
            row, reference = record(given_, kind, on_host=on_host), Reference(given_)
            assert (row.elements, row.sampled) == (tensor.numel(), SAMPLED)
            assert (row.max, row.nan, row.inf) == (
                reference.max,
                sum(map(math.isnan, reference.values)),
                sum(map(math.isinf, reference.values)),
            )
            for name, share in reference.shares.items():
                if name == "would_flush" and dtype == torch.float16:
                    continue
                # Five standard errors of a share of 16,384, of which the docstring states one.
                bound = 5 * math.sqrt(share * (1 - share) / SAMPLED) + 3 / SAMPLED
                assert abs(getattr(row, name) - share) <= bound, name


def test_the_flush_fraction_is_off_by_less_than_half_a_point_on_average() -> None:
    torch.manual_seed(1)
    errors = []
    for exponent in np.linspace(-40, -10, 30):
        tensor = torch.randn(400_000) * 2.0 ** float(exponent)
        true = (tensor.double().abs() <= 2.0**-25).double().mean().item()
        errors.append(abs((record(tensor).would_flush or 0.0) - true))
    assert sum(errors) / len(errors) < 0.0017  # of 1: 0.17 points


@pytest.mark.parametrize("kind", ["output", "grad_output", "grad"])
def test_what_went_through_fp16_claims_no_flush(kind: Kind) -> None:
    """At a scale of 2^-12 fp16 has flushed most of a gradient; of the rest nothing would be."""
    torch.manual_seed(0)
    gradient = (torch.randn(10_000) * 2.0**-14 * 2.0**-12).half().float()
    row = record(gradient, kind, through_fp16=True)
    assert row.would_flush is None
    assert row.zeros == (gradient == 0).double().mean().item() > 0.3
    assert row.lowest_exponent == -24
    assert record(gradient, "weight", through_fp16=True).would_flush == 0.0


@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**-12, 1000.0])
def test_exponents_of_a_gradient_are_given_with_and_without_the_scale(scale: float) -> None:
    gradient = torch.tensor([0.5, 3.0]) * scale
    row = record(gradient, "grad", scale=scale, scaled=True)
    assert row.scale == scale
    assert row.lowest_exponent == math.frexp(0.5 * scale)[1] - 1
    assert row.lowest_unscaled_exponent == pytest.approx(row.lowest_exponent - math.log2(scale))
    unscaled = record(gradient, "output", scale=scale)
    assert (unscaled.scale, unscaled.lowest_unscaled_exponent) == (1.0, unscaled.lowest_exponent)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_tells_its_size_and_what_was_lost(dtype: torch.dtype, on_host: bool) -> None:
    torch.manual_seed(0)
    before = torch.randn(300, 100).to(dtype)
    gradient = torch.randn(300, 100) * (torch.rand(300, 100) < 0.7)
    after = (before.float() - 2.0**-9 * gradient).to(dtype)
    samples = Samples(CPU, on_host=on_host)
    samples.add(before, Key("", "weight", "w"))
    samples.add_update(Key("", "update", "w"), before, after, gradient)
    weight, update = samples.finish().records(1, 1) or []
    unchanged = (gradient != 0) & (before == after)
    assert update.lost == unchanged.sum().item() / (gradient != 0).sum().item()
    difference = after.double() - before.double()
    assert update.max == difference.abs().max().item()
    ratio = difference.pow(2).mean().sqrt() / before.double().pow(2).mean().sqrt()
    assert update.update_ratio == pytest.approx(ratio.item(), rel=0.05)
    assert (update.lost == 0.0) == (dtype == torch.float32) or dtype != torch.float32
    assert weight.update_ratio is None is weight.lost


def test_a_skipped_step_lost_nothing() -> None:
    samples = Samples(CPU)
    weight = torch.ones(10)
    samples.add_update(Key("", "update", "w"), weight, weight, torch.ones(10))
    (row,) = samples.finish(found_inf=torch.ones(())).records(1, 1) or []
    assert row.lost is None
    assert row.zeros == 1.0


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("size", [1000, 100_000])
def test_only_a_shadow_proves_what_was_flushed(size: int, on_host: bool) -> None:
    torch.manual_seed(0)
    scale = 2.0**-12
    true = torch.randn(size) * 2.0**-13
    true[::2] = 0.0  # structural zeros, as after a ReLU
    held = (true * scale).half()
    samples = Samples(CPU, on_host=on_host)
    samples.begin(scale)
    samples.add(held, Key("layer", "grad", "w"), scaled=True, shadow=true)
    (row,) = samples.finish().records(1, 1) or []
    flushed = ((held == 0) & (true != 0)).double().mean().item()
    assert row.shadow is not None
    assert row.shadow.flushed == pytest.approx(flushed, abs=0.01)
    assert flushed > 0.2
    assert row.zeros > row.shadow.flushed + 0.45
    error = (held.double() / scale - true).norm() / true.double().norm()
    assert row.shadow.error == pytest.approx(error.item(), rel=0.05)
    cosine = torch.cosine_similarity(held.double(), true.double(), dim=0)
    assert row.shadow.cosine == pytest.approx(cosine.item(), abs=0.01)
    assert row.shadow.rms == pytest.approx(true.square().mean().sqrt().item(), rel=0.05)
    assert row.shadow.zeros == pytest.approx(0.5, abs=0.02)
    assert row.shadow.overflowed == 0.0


def test_what_is_zero_has_no_angle_to_its_shadow() -> None:
    samples = Samples(CPU)
    samples.add(torch.zeros(3), Key("layer", "grad", "w"), shadow=torch.ones(3))
    (row,) = samples.finish().records(1, 1) or []
    assert row.shadow is not None
    assert (row.shadow.cosine, row.shadow.error, row.shadow.rms) == (None, 1.0, 1.0)


def test_a_shadow_shows_what_overflowed() -> None:
    samples = Samples(CPU)
    true = torch.tensor([1e5, 2.0, math.inf, 3.0])
    samples.add(true.half(), Key("layer", "output", "layer"), shadow=true)
    (row,) = samples.finish().records(1, 1) or []
    assert row.shadow is not None
    assert (row.shadow.overflowed, row.shadow.error) == (0.25, 0.0)


@given(tensor=tensors())
@settings(max_examples=50, deadline=None)
def test_a_record_is_strict_json_and_comes_back(tensor: Tensor) -> None:
    row = record(tensor)
    assert LayerRecord.model_validate_json(row.to_json()) == row


def test_on_a_gpu_nothing_is_read_and_the_table_is_copied_once() -> None:
    samples = Samples(CPU, on_host=False)
    weights = [torch.randn(200, 200) for _ in range(5)]
    with HostReads() as reads:
        samples.begin(torch.tensor(8.0))
        for number, weight in enumerate(weights):
            samples.add(weight, Key("", "weight", str(number)))
            samples.add_update(Key("", "update", str(number)), weight, weight + 1, weight)
        pending = samples.finish(torch.zeros(()))
        assert reads.count == 0
    assert isinstance(pending.table, Tensor)
    assert pending.table.shape[0] == 10


def test_both_ways_of_counting_agree() -> None:
    for tensor in distributions("output"):
        for scale in (1.0, 4.0):
            rows = [record(tensor, scale=scale, on_host=on_host) for on_host in (True, False)]
            assert rows[0].rms == pytest.approx(rows[1].rms, rel=1e-6)
            host, device = (row.model_copy(update={"rms": 0.0}) for row in rows)
            assert host == device


@pytest.mark.parametrize("size", [10, 50_000])
@pytest.mark.parametrize("on_host", [True, False])
def test_what_changes_a_tensor_afterwards_changes_nothing(size: int, on_host: bool) -> None:
    samples = Samples(CPU, on_host=on_host)
    samples.begin(1.0, keep=True)
    tensor = torch.full((size,), -1.0)
    samples.add(tensor, Key("", "output", "norm"))
    tensor.relu_()
    (row,) = samples.finish().records(1, 1) or []
    assert (row.max, row.zeros, row.rms) == (1.0, 0.0, 1.0)
    (kept,) = samples.kept.values()
    assert set(kept.tolist()) == {-1.0}


def test_a_table_is_used_again() -> None:
    samples = Samples(CPU, on_host=False)
    samples.add(torch.full((5,), math.inf), Key("", "weight", "w"))
    first = samples.finish()
    samples.begin(1.0)
    samples.add(torch.ones(5), Key("", "weight", "w"))
    (second,) = samples.finish().records(2, 1) or []
    assert (first.records(1, 1) or [])[0].inf == 5
    assert (second.inf, second.max, second.exponents) == (0, 1.0, (5,))


@pytest.mark.parametrize("period", [2, 3, 4, 7, 64])
def test_a_pattern_that_repeats_is_not_mistaken_for_the_whole(period: int) -> None:
    """As channels do: a sample at regular intervals would see some of them only."""
    tensor = (torch.arange(64 * SAMPLED) % period == 0).float()
    assert record(tensor).zeros == pytest.approx(1 - 1 / period, abs=0.02)


def test_equal_shapes_are_sampled_at_equal_places() -> None:
    tensor = torch.arange(70_000.0).view(7, 100, 10, 10)
    other = tensor.to(memory_format=torch.channels_last)
    assert torch.equal(statistics.sampled(tensor), statistics.sampled(other))
    sample = statistics.sampled(tensor)
    assert torch.equal(sample, sample.sort().values)
    assert sample.diff().max() < 2 * 70_000 / SAMPLED + 1  # all of it is looked at
