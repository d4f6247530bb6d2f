"""What is seen of operations: sums in half, and the logits of attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcli.precision.operations import OperationsSeen, rows_seen
from mpcli.precision.trace import ModuleTrace


def seen(model: nn.Module, *inputs: Tensor) -> OperationsSeen:
    found = OperationsSeen(attention=True)
    with ModuleTrace(model, listen=found):
        model(*inputs)
    return found


def test_rows_of_logits_without_their_masked_places() -> None:
    rows = rows_seen(torch.tensor([[0.0, 0.0, -math.inf], [0.0, 20.0, -1e9], [3.0, -1e4, -1e4]]))
    assert rows.rows == 2  # the third has one key
    assert rows.saturated == 0.5  # e^-20 is less than 2^-25
    assert rows.entropy == pytest.approx(0.5, abs=1e-6)
    assert rows.logit_max == 20


def test_logits_that_are_not_finite_are_no_rows() -> None:
    assert rows_seen(torch.tensor([[math.nan, 1.0], [math.inf, 1.0]])).rows == 0
    assert rows_seen(torch.zeros(0, 4)).rows == 0


class Written(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        return (logits if mask is None else logits + mask).softmax(-1) @ v


class Fused(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_seen_as_it_is_when_written_out(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcli.precision.operations.CHUNK", 80)  # a sample at a time
    torch.manual_seed(0)
    q, k, v = (10 * torch.randn(3, 2, 5, 4) for _ in range(3))
    mask = torch.full((5, 5), -math.inf).triu(1) if masked else None
    (one,) = seen(Written(), q, k, v, mask).attention.values()
    (two,) = seen(Fused(), q, k, v, mask).attention.values()
    assert two.product_max == pytest.approx(one.product_max / 2, rel=1e-5)
    for name in ("logit_max", "entropy", "saturated", "rows"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-4, abs=1e-6)
    assert two.rows == 3 * 2 * (4 if masked else 5)


def test_causal_attention_has_its_mask() -> None:
    class Causal(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    (found,) = seen(Causal(), torch.randn(1, 1, 5, 4)).attention.values()
    assert found.rows == 4


def test_a_softmax_that_follows_no_product_is_no_attention() -> None:
    assert seen(nn.Softmax(-1), torch.randn(2, 3, 3)).attention == {}


def test_sums_count_where_their_result_is_half() -> None:
    class Sums(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values.sum() + values.mean(dtype=torch.float32)

    assert seen(Sums(), torch.ones(3, dtype=torch.float16)).half == {"": {"sum"}}
    assert seen(Sums(), torch.ones(3)).half == {}
