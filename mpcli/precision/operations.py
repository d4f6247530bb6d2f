"""What a forward's operations tell beyond its modules: sums in half precision, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "_log_softmax"})
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


NO_ROWS = AttentionSeen(0.0, 0.0, 1.0, 0.0, 0)


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
        elif (
            name in ("_softmax", "_safe_softmax")
            and self._product
            and result.numel() == self._product[1]
        ):
            # The logits of attention come out of a product of as many elements.
            owner, _, largest = self._product
            self._add(owner, replace(rows_seen(given["self"]), product_max=largest))
        elif "scaled_dot_product" in name and {"query", "key"} <= given.keys():
            query, key = given["query"], given["key"]
            if query.shape[:-2] == key.shape[:-2]:  # else several queries share a key
                self._add(call, _fused(query, key, given))

    def _add(self, call: Call, seen: AttentionSeen) -> None:
        """Several attentions of one call count together."""
        before = self.attention.get(call)
        self.attention[call] = _all_together([before, seen]) if before else seen


@torch.no_grad()
def rows_seen(logits: Tensor) -> AttentionSeen:
    """What a softmax over the last dimension is given, masked places and all."""
    rows = logits.reshape(-1, logits.shape[-1])
    size = max(1, CHUNK // max(logits.shape[-1], 1))
    return _all_together([_rows(part.float()) for part in rows.split(size)])


def _rows(logits: Tensor) -> AttentionSeen:
    kept = logits >= MASKED
    keys = kept.sum(-1)
    largest = _largest(logits.masked_fill(~kept, 0.0))
    probabilities = logits.softmax(-1)
    counted = (keys > 1) & probabilities.isfinite().all(-1)
    rows = int(counted.sum())
    if not rows:
        return replace(NO_ROWS, product_max=largest, logit_max=largest)
    probabilities, keys = probabilities[counted], keys[counted]
    entropy = torch.special.entr(probabilities).sum(-1) / keys.log()
    saturated = (probabilities.amax(-1) == 1.0).float().mean()
    return AttentionSeen(largest, largest, float(entropy.mean()), float(saturated), rows)


def _fused(query: Tensor, key: Tensor, given: Mapping[str, Any]) -> AttentionSeen:
    """The logits of a fused attention are computed again, some samples at a time."""
    scale = given.get("scale") or 1.0 / math.sqrt(query.shape[-1])
    mask = given.get("attn_mask", given.get("attn_bias"))
    size = max(1, CHUNK // max(query[:1, ..., 0].numel() * key.shape[-2], 1))
    found = []
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        logits = query[part].float() @ key[part].float().mT * scale
        largest = _largest(logits)
        if mask is not None:
            logits = logits + (mask[part] if len(mask) == len(query) else mask)
        if given.get("is_causal"):
            logits = logits.masked_fill(torch.ones_like(logits[0]).tril() == 0, -math.inf)
        found.append(replace(rows_seen(logits), product_max=largest))
    return _all_together(found)


def _all_together(parts: Sequence[AttentionSeen]) -> AttentionSeen:
    """Means over the rows of all."""
    rows = sum(part.rows for part in parts)

    def mean(values: Iterable[float]) -> float:
        return sum(v * part.rows for v, part in zip(values, parts, strict=True)) / rows

    if not rows:
        largest = max((part.product_max for part in parts), default=0.0)
        return replace(NO_ROWS, product_max=largest, logit_max=largest)
    return AttentionSeen(
        product_max=max(part.product_max for part in parts),
        logit_max=max(part.logit_max for part in parts),
        entropy=mean(part.entropy for part in parts),
        saturated=mean(part.saturated for part in parts),
        rows=rows,
    )


def _largest(values: Tensor) -> float:
    """Largest magnitude of what is not NaN."""
    return float(values.abs().nan_to_num(0.0, posinf=math.inf).max()) if values.numel() else 0.0
