"""Which 16-bit format a model's weights fit: by layer, and as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from mpcli.diagnose.statics import Statics

MAX_FLUSHED = 0.1
"""Share of a layer's non-zero values that may become zero."""
MAX_ERROR = 2.0**-8
"""L2 norm of what rounding changes in a layer, over that of the layer: twice bf16's worst."""
_LISTED = 20


class Verdict(NamedTuple):
    """What the weights need.

    Args:
        text: for people: `fits fp16`, `needs bf16` or `needs these layers in fp32: [...]`.
        dtype: for the layers that are not named; None where there are no layers.
        fp32_layers: that `dtype` cannot hold.
    """

    text: str
    dtype: Literal["fp16", "bf16", "fp32"] | None
    fp32_layers: tuple[str, ...]


def layer_of(name: str) -> str:
    """The module that has a tensor: its name without the last part."""
    return name.rpartition(".")[0] or name


def fits(layer: Statics, dtype: str) -> bool:
    """Whether fp16 or bf16 can hold a layer's finite values.

    It can if none of them overflows, if at most `MAX_FLUSHED` of the non-zero ones become zero,
    and if rounding changes the layer by at most `MAX_ERROR`. fp16 rounds normal numbers to one
    part in 2^11: a larger error means that what matters in the layer is subnormal or flushed. Tiny
    values beside ordinary weights change little, and are no reason for fp32: the biases of
    attention's keys, which nothing moves but rounding, are below 2^-25 in most models.
    """
    outside = layer.outside[dtype]
    return (
        outside.above == 0
        and layer.share(outside.below) <= MAX_FLUSHED
        and layer.error(dtype) <= MAX_ERROR
    )


def judge(layers: Mapping[str, Statics]) -> Verdict:
    """The cheapest storage that can hold all layers.

    `fits fp16` if fp16 can hold every layer. If it cannot hold some, and they have no more than
    half of the values, those layers need fp32 beside fp16 for the rest, whose steps are eight
    times as fine as bf16's; if they have more, the model needs bf16, and fp32 for the layers that
    bf16 cannot hold either.

    This says what storing the weights would do to them, and no more: activations and gradients
    may need another format. NaN and infinity are left out, and so is what was lost before: weights
    that are stored in fp16 fit fp16.

    Args:
        layers: those that have finite values.
    """
    if not layers:
        return Verdict("no finite values", None, ())
    unfit = [name for name, layer in layers.items() if not fits(layer, "fp16")]
    if not unfit:
        return Verdict("fits fp16", "fp16", ())
    total = sum(layer.elements for layer in layers.values())
    if 2 * sum(layers[name].elements for name in unfit) <= total:
        return Verdict(_needs_fp32(unfit, "fp16"), "fp16", tuple(unfit))
    unfit = [name for name in unfit if not fits(layers[name], "bf16")]
    if not unfit:
        return Verdict("needs bf16", "bf16", ())
    if len(unfit) == len(layers):
        return Verdict(_needs_fp32(unfit, None), "fp32", tuple(unfit))
    return Verdict(_needs_fp32(unfit, "bf16"), "bf16", tuple(unfit))


def listed(names: Sequence[str]) -> str:
    """`[a, b]`; of many, the first ones and how many more there are."""
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return f"[{', '.join([*names[:_LISTED], *more])}]"


def _needs_fp32(layers: list[str], rest: str | None) -> str:
    beside = f" (and {rest} for the others)" if rest else ""
    return f"needs these layers in fp32: {listed(layers)}{beside}"
