"""What a forward's operations tell beyond its modules: sums in half precision, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mpcli.precision.formats import HALF

Call = tuple[str, int]
"""Name of a module, and number of its call."""
Listener = Callable[[Call, Any, Mapping[str, Any], Any], None]
"""Told of each operation: the module's call that ran it, the operator, its arguments by name, and
its result."""

REDUCTIONS = frozenset((
    *("sum", "mean", "cumsum", "cumprod", "prod", "var", "var_mean", "std", "std_mean"),
    *("norm", "linalg_vector_norm", "logsumexp", "dot", "vdot"),
))  # fmt: skip
"""Operations whose result adds up, or multiplies, many elements of one tensor."""
SOFTMAXES = frozenset({"_softmax", "_log_softmax"})
NORMS = frozenset((
    *("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_functional", "cudnn_batch_norm"),
))  # fmt: skip
"""Fused kernels, which compute their statistics in fp32 whatever they are given."""

PARTS = frozenset({"sqrt", "rsqrt", "exp"})
"""Of norms and softmaxes that are written out."""

MASKED = -9e3
"""Logits below are masked: -inf, the least number of a type, -1e9, or the -1e4 of old models."""
CHUNK = 2**24
"""Logits of a fused attention that are computed at once: 64 MiB."""


@dataclass(frozen=True)
class AttentionSeen:
    """The logits of one attention in one call of a module.

    Attributes:
        product_max: largest |q . k|, scaled where the scale is applied before the product; for a
            fused attention, the logits themselves.
        logit_max: largest magnitude of what the softmax was given, but for masked places.
        entropy: mean of the rows' entropies, each over the log of how many keys are not masked;
            0: every query looks at one key, 1: at all alike.
        saturated: share of the rows whose largest probability is 1 in fp32: no gradient gets past.
        rows: that have two keys or more.
    """

    product_max: float
    logit_max: float
    entropy: float
    saturated: float
    rows: int


class OperationsSeen:
    """Listens to a forward.

    Attributes:
        half: by module, the reductions, softmaxes and norms, or parts of such, whose result is in
            half precision.
        attention: by the call that multiplied queries with keys; only if asked for.
    """

    def __init__(self, *, attention: bool) -> None:
        self.half: dict[str, set[str]] = {}
        self.attention: dict[Call, AttentionSeen] = {}
        self._sees_attention = attention
        self._product: tuple[Call, int, float] | None = None  # of which size, and largest

    def __call__(self, call: Call, operator: Any, given: Mapping[str, Any], result: Any) -> None:
        """Look at one operation."""
        name = operator.overloadpacket.__name__
        first = result[0] if isinstance(result, tuple | list) and result else result
        if not isinstance(first, Tensor):
            return
        if first.dtype in HALF and name in REDUCTIONS | SOFTMAXES | NORMS | PARTS:
            self.half.setdefault(call[0], set()).add(name)
        if self._sees_attention:
            with torch.no_grad(), _disable_current_modes():
                self._look(call, name, given, first)

    def _look(self, call: Call, name: str, given: Mapping[str, Any], result: Tensor) -> None:
        if name in ("bmm", "baddbmm"):
            self._product = call, result.numel(), _largest(result)
        elif name == "_softmax" and self._product and result.numel() == self._product[1]:
            # The logits of attention come out of a product of as many elements.
            owner, _, largest = self._product
            self._add(owner, replace(rows_seen(given["self"]), product_max=largest))
        elif "scaled_dot_product" in name and {"query", "key"} <= given.keys():
            self._add(call, _fused(given))

    def _add(self, call: Call, seen: AttentionSeen) -> None:
        """Several attentions of one call count together."""
        before = self.attention.get(call)
        self.attention[call] = _together(before, seen) if before else seen


@torch.no_grad()
def rows_seen(logits: Tensor) -> AttentionSeen:
    """What a softmax over the last dimension is given, masked places and all."""
    logits = logits.float()
    kept = logits >= MASKED
    keys = kept.sum(-1)
    open_logits = logits.masked_fill(~kept, 0.0)
    probabilities = logits.softmax(-1)
    counted = (keys > 1) & probabilities.isfinite().all(-1)
    rows = int(counted.sum())
    largest = _largest(open_logits)
    if not rows:
        return AttentionSeen(largest, largest, 1.0, 0.0, 0)
    probabilities, keys = probabilities[counted], keys[counted]
    entropy = torch.special.entr(probabilities).sum(-1) / keys.log()
    saturated = (probabilities.amax(-1) == 1.0).float().mean()
    return AttentionSeen(largest, largest, float(entropy.mean()), float(saturated), rows)


def _fused(given: Mapping[str, Any]) -> AttentionSeen:
    """The logits of a fused attention are computed again, some samples at a time."""
    query, key = given["query"].float(), given["key"].float()
    scale = given.get("scale") or 1.0 / math.sqrt(query.shape[-1])
    mask = given.get("attn_mask", given.get("attn_bias"))
    seen = None
    per_sample = query[:1, ..., 0].numel() * key.shape[-2]
    size = max(1, CHUNK // max(per_sample, 1))
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        logits = query[part] @ key[part].mT * scale
        largest = _largest(logits)
        if mask is not None:
            own = mask[part] if mask.dim() == query.dim() and len(mask) == len(query) else mask
            is_open = own.dtype == torch.bool
            logits = logits.masked_fill(~own, -math.inf) if is_open else logits + own
        if given.get("is_causal"):
            logits = logits.masked_fill(torch.ones_like(logits[0]).tril() == 0, -math.inf)
        found = replace(rows_seen(logits), product_max=largest)
        seen = _together(seen, found) if seen else found
    return seen or AttentionSeen(0.0, 0.0, 1.0, 0.0, 0)


def _together(one: AttentionSeen, two: AttentionSeen) -> AttentionSeen:
    rows = one.rows + two.rows

    def mean(first: float, second: float) -> float:
        return (first * one.rows + second * two.rows) / rows if rows else first

    return AttentionSeen(
        product_max=max(one.product_max, two.product_max),
        logit_max=max(one.logit_max, two.logit_max),
        entropy=mean(one.entropy, two.entropy),
        saturated=mean(one.saturated, two.saturated),
        rows=rows,
    )


def _largest(values: Tensor) -> float:
    """Largest magnitude of what is not NaN."""
    return float(values.abs().nan_to_num(0.0, posinf=math.inf).max()) if values.numel() else 0.0
