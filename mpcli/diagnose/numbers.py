"""What is in files of weights and of an optimizer's state, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcli.diagnose.facts import (
    OptimizerFacts,
    ScalerFacts,
    StateFacts,
    TensorFacts,
    WeightFacts,
    tensor_facts,
)
from mpcli.diagnose.statics import Statics, examine, extremes
from mpcli.diagnose.verdict import Verdict, fits, judge, layer_of, listed
from mpcli.precision.formats import dtype_name

_EXAMINED = frozenset((
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
))  # fmt: skip


@dataclass
class _State:
    """All tensors of one name in an optimizer's state, such as `exp_avg_sq`."""

    tensors: int = 0
    elements: int = 0
    nan: int = 0
    inf: int = 0
    max: float = 0.0
    zero: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)


class Numbers:
    """Collects facts; nothing of a tensor is kept."""

    def __init__(self) -> None:
        self._tensors: dict[str, Statics] = {}
        self._others: dict[str, str] = {}
        self._tied: dict[str, str] = {}
        self._places: dict[tuple[Any, ...], str] = {}
        self._states: dict[str, _State] = {}
        self.scaler: ScalerFacts | None = None

    def __contains__(self, name: str) -> bool:
        """Whether a weight of this name was there."""
        return any(name in known for known in (self._tensors, self._others, self._tied))

    def weight(self, name: str, tensor: Tensor) -> None:
        """Examine a weight or a buffer; of complex ones, both parts."""
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if is_examined(tensor):
            self._tensors[name] = examine(stored_once(tensor))
        else:
            self._others[name] = dtype_name(tensor.dtype)

    def tied(self, file: Path, name: str, tensor: Tensor) -> bool:
        """Note where a tensor is, and whether it is one that was there before: it counts once.

        Args:
            file: that it is of; another one may come to lie where this one was in memory.
        """
        if not is_examined(tensor) or not tensor.numel():
            return False
        place = (
            file, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype,
            tensor.shape, tensor.stride(),
        )  # fmt: skip
        first = self._places.setdefault(place, name)
        if first != name:
            self._tied[name] = first
        return first != name

    def state(self, key: str, parameter: str, tensor: Tensor) -> None:
        """Look at a tensor of an optimizer's state.

        Args:
            key: such as `exp_avg_sq`.
            parameter: name or number of the one that it belongs to.
        """
        if not is_examined(tensor):
            return
        found = self._states.setdefault(key, _State())
        nan, inf, largest, zeros = extremes(stored_once(tensor))
        found.tensors += 1
        found.elements += tensor.numel()
        found.nan += nan
        found.inf += inf
        found.max = max(found.max, largest)
        if nan or inf:
            found.nonfinite.append(parameter)
        if zeros and zeros == tensor.numel() and tensor.dim():
            found.zero.append(parameter)

    def weights(self) -> WeightFacts | None:
        """Facts about all weights; None where there are none."""
        if not self._tensors and not self._others:
            return None
        layers: dict[str, Statics] = {}
        for name, tensor in self._tensors.items():
            layer = layer_of(name)
            layers[layer] = layers.get(layer, Statics()) + tensor
        verdict = judge({name: layer for name, layer in layers.items() if layer.finite})
        nonfinite = tuple(name for name, layer in layers.items() if layer.nonfinite)
        return WeightFacts(
            verdict=_verdict_text(verdict, nonfinite) if layers else "no floating-point values",
            dtype=verdict.dtype,
            fp32_layers=verdict.fp32_layers,
            nonfinite_layers=nonfinite,
            total=tensor_facts("", sum(layers.values(), Statics())),
            layers=tuple(_layer(name, layer) for name, layer in layers.items()),
            tensors=tuple(tensor_facts(name, tensor) for name, tensor in self._tensors.items()),
            tied=self._tied,
            not_examined=self._others,
        )

    def optimizer(self) -> OptimizerFacts | None:
        """Facts about an optimizer's state; None where there is none."""
        if not self._states:
            return None
        return OptimizerFacts(
            states=tuple(
                StateFacts(
                    key=key, tensors=state.tensors, elements=state.elements, nan=state.nan,
                    inf=state.inf, max=state.max, zero=tuple(state.zero),
                    nonfinite=tuple(state.nonfinite),
                )
                for key, state in self._states.items()
            )
        )  # fmt: skip


def scaler_facts(state: Mapping[str, Any]) -> ScalerFacts:
    """A `GradScaler`'s state.

    Raises:
        ValueError: it holds no numbers.
    """
    scale, tracker = float(state["scale"]), float(state["_growth_tracker"])
    if not math.isfinite(tracker):
        raise ValueError("its growth tracker is no number")
    interval = state.get("growth_interval")
    return ScalerFacts(
        scale=scale,
        growth_tracker=int(tracker),
        growth_interval=interval if type(interval) is int else None,
    )


def stored_once(tensor: Tensor) -> Tensor:
    """The tensor without what `expand` repeated."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def is_examined(tensor: Tensor) -> bool:
    """Whether a tensor has floating-point values in memory."""
    return tensor.dtype in _EXAMINED and tensor.layout is torch.strided and tensor.is_cpu


def _layer(name: str, layer: Statics) -> TensorFacts:
    if not layer.finite:
        return tensor_facts(name, layer)
    holds = {dtype: fits(layer, dtype) for dtype in ("fp16", "bf16")}
    return tensor_facts(name, layer).model_copy(update={"fits": holds})


def _verdict_text(verdict: Verdict, nonfinite: tuple[str, ...]) -> str:
    if nonfinite:
        return f"NaN or infinity in these layers: {listed(nonfinite)}; {verdict.text}"
    return verdict.text
