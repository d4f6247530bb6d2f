"""Exact counts of what number formats can hold, against torch's own casts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcli.diagnose import statics
from mpcli.diagnose.statics import FORMATS, Statics, examine

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.builds(
        lambda limit, steps, sign: sign * _neighbour(limit, steps),
        st.sampled_from([
            limit for form in FORMATS.values()
            for limit in (form.flush_limit, form.normal_limit, form.overflow_limit, form.max)
        ]),
        st.integers(-2, 2),
        st.sampled_from([-1.0, 1.0]),
    ),
)  # fmt: skip


def _neighbour(value: float, steps: int) -> float:
    """The fp32 number some steps away from one that is not zero."""
    bits = np.float32(value).view(np.int32) + np.int32(steps)
    return float(bits.view(np.float32))


@pytest.mark.parametrize("name", FORMATS)
@given(values=st.lists(FLOATS, max_size=40))
def test_counts_are_those_of_torchs_casts(name, values):
    exact = torch.tensor(values, dtype=torch.float32)
    exact = exact[exact.isfinite()]
    form, found = FORMATS[name], examine(exact)
    rounded = exact.to(form.dtype).float().abs()
    nonzero = exact != 0
    outside = found.outside[name]
    assert outside.below == int((nonzero & (rounded == 0)).sum())
    kept = nonzero & (rounded > 0) & (rounded < torch.finfo(form.dtype).tiny)
    assert outside.subnormal == int(kept.sum())
    if name != "e4m3":  # which has no infinity: torch's cast saturates
        assert outside.above == int(rounded.isinf().sum())
    else:
        assert outside.above == int((exact.abs().double() > 464).sum())


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_what_is_not_finite_is_counted_and_left_out(values):
    exact = torch.tensor(values, dtype=torch.float32)
    finite = exact[exact.isfinite()].double()
    found = examine(exact)
    assert (found.nan, found.inf) == (int(exact.isnan().sum()), int(exact.isinf().sum()))
    assert found.zeros == int((exact == 0).sum())
    assert found.max == (finite.abs().max().item() if len(finite) else 0)
    expected = finite.square().mean().sqrt().item() if len(finite) else 0
    assert math.isclose(found.rms, expected, rel_tol=1e-9)


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2,
])  # fmt: skip
def test_every_floating_point_type_is_examined_in_its_own_precision(dtype):
    values = torch.tensor([0.0, 1.0, -224.0, 2.0**-6]).to(dtype)
    found = examine(values)
    assert (found.elements, found.zeros, found.max) == (4, 1, 224.0)
    assert not any(outside.above or outside.below for outside in found.outside.values())


def test_a_double_just_below_the_limit_does_not_overflow():
    values = torch.tensor([math.nextafter(65520, 0), 65520.0], dtype=torch.float64)
    assert examine(values).outside["fp16"].above == 1  # through fp32 both would


def test_pieces_of_a_tensor_add_up_whatever_its_layout(monkeypatch):
    values = torch.randn(6, 10, 14) * 10.0 ** torch.randint(-9, 6, (6, 10, 14))
    whole = examine(values)
    monkeypatch.setattr(statics, "CHUNK", 16)
    for layout in (values, values.transpose(0, 2), values.repeat(1, 2, 1)[:, :10]):
        found = examine(layout)
        assert found.outside["fp16"].below == whole.outside["fp16"].below > 0
        assert found.outside["fp16"].above == whole.outside["fp16"].above > 0
        assert math.isclose(found.rms, whole.rms)
        assert math.isclose(found.error("fp16"), whole.error("fp16"))


def test_no_more_than_a_piece_is_copied(monkeypatch):
    monkeypatch.setattr(statics, "CHUNK", 1024)
    sizes = []
    examined = statics._examined
    monkeypatch.setattr(
        statics, "_examined", lambda values: sizes.append(values.numel()) or examined(values)
    )
    examine(torch.zeros(3, 100_000).t())
    assert sum(sizes) == 300_000
    assert max(sizes) <= 1024


def test_shares_are_of_finite_values_that_are_not_zero():
    found = examine(torch.tensor([0.0, math.nan, math.inf, 1e-9, 1.0, 1.0, 1.0]))
    assert found.share(found.outside["fp16"].below) == 0.25
    assert examine(torch.zeros(3)).share(0) == 0


@pytest.mark.parametrize(("value", "bits"), [(65520.0, 0), (32760.0, 1), (1.0, math.log2(65520))])
def test_headroom_is_in_factors_of_two_to_fp16s_overflow(value, bits):
    assert examine(torch.tensor([value, -0.5, math.inf])).headroom == bits


def test_zeros_have_no_headroom():
    assert examine(torch.zeros(2)).headroom is None


def test_the_rounding_error_is_that_of_torchs_cast():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-6
    for name in ("fp16", "bf16"):
        rounded = values.to(FORMATS[name].dtype).float()
        expected = ((values - rounded).double().norm() / values.double().norm()).item()
        assert math.isclose(examine(values).error(name), expected, rel_tol=1e-6)


def test_huge_doubles_are_no_error():
    found = examine(torch.tensor([1e300, -1e308], dtype=torch.float64))
    assert found.outside["bf16"].above == 2


def test_the_sum_of_two_is_what_both_together_are():
    first, second = torch.tensor([1e-9, 1e6]), torch.tensor([1.0, math.nan]).half()
    both = examine(first) + examine(second)
    assert both.dtypes == {"fp32": 2, "fp16": 2}
    assert (both.elements, both.nan, both.max) == (4, 1, 1e6)
    assert Statics() + both == both
