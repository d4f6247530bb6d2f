"""Optimizers as recipes name them, and the memory that their state takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from mpcli.optim.eight_bit import BLOCK, bitsandbytes_adamw, has_8bit_state, torchao_adamw
from mpcli.optim.host_read import HostRead
from mpcli.precision.sensitive import last_layer
from mpcli.recipe.optim import Adafactor, Adam, AdamW, AdamW8bit, Muon, Optim, Sgd

Named = Sequence[tuple[str, Tensor]]


def build_optimizer(
    optim: Optim, named: Named, learning_rate: Tensor, apart: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer, which skips its step where its attribute `found_inf` is 1.

    torch's fused kernels read `found_inf` and the learning rate on the device; for the others,
    which read neither, the host does (`HostRead`). All state is made here, before the first step,
    of tensors alone. torch makes SGD's momentum buffer in the first step, with `empty_like`, and
    keeps that garbage when the first step is skipped (seen in 2.14.1).

    Args:
        named: the weights that it steps, with their names in the model. State has their types.
        learning_rate: fp32 scalar tensor on the weights' device, written before each step.
        apart: see `weights_apart`.
    """
    match optim:
        case Sgd():
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                _groups(optim, named),
                lr=learning_rate,
                momentum=optim.momentum,
                nesterov=optim.nesterov,
                fused=True,
            )
            if optim.momentum:
                for _, weight in named:
                    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            return optimizer
        case Adam():
            return _fused(torch.optim.Adam, optim, named, learning_rate)
        case AdamW():
            return _fused(torch.optim.AdamW, optim, named, learning_rate)
        case AdamW8bit():
            eight, others = _divided(named, partial(has_8bit_state, optim, apart))
            host_read = HostRead(named, learning_rate)
            if eight:
                groups = _groups(optim, eight)
                if optim.implementation == "bitsandbytes":
                    host_read.add(*bitsandbytes_adamw(optim, groups))
                else:
                    host_read.add(*torchao_adamw(optim, groups, learning_rate))
            if others:
                host_read.add(_fused(torch.optim.AdamW, optim, others, learning_rate))
            return host_read
        case Adafactor():
            adafactor = torch.optim.Adafactor(
                _groups(optim, named),
                lr=optim.lr,
                beta2_decay=optim.beta2_decay,
                eps=optim.eps,
                d=optim.clipping_threshold,
            )
            for _, weight in named:
                adafactor.state[weight] = _factors(weight)
            host_read = HostRead(named, learning_rate)
            host_read.add(adafactor)
            return host_read
        case Muon():
            matrices, others = _divided(named, partial(_is_hidden_matrix, apart))
            host_read = HostRead(named, learning_rate)
            if matrices:
                muon = torch.optim.Muon(
                    _groups(optim, matrices),
                    lr=optim.lr,
                    momentum=optim.momentum,
                    nesterov=optim.nesterov,
                    adjust_lr_fn="match_rms_adamw",
                )
                for _, weight in matrices:
                    muon.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                host_read.add(muon)
            if others:
                host_read.add(_fused(torch.optim.AdamW, optim, others, learning_rate))
            return host_read
        case _:
            assert_never(optim)


def weights_apart(optim: Optim, model: nn.Module) -> frozenset[str]:
    """Names of the weights that an optimizer steps as AdamW because of what they are.

    The authors of 8-bit states keep those of embeddings in 32 bits (Dettmers et al. 2022, section
    2.3); Muon is for the matrices between embeddings and the last layer (Jordan et al. 2024).
    """
    modules: list[nn.Module] = []
    if isinstance(optim, AdamW8bit | Muon):
        modules += [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    if isinstance(optim, Muon):
        modules.append(model.get_submodule(last_layer(model)))
    weights = {weight for module in modules for weight in module.parameters(recurse=False)}
    return frozenset(name for name, weight in model.named_parameters() if weight in weights)


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the weights that learn and that `muon` steps as matrices."""
    apart = weights_apart(Muon(kind="muon", lr=1.0), model)
    learning = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return [name for name, weight in learning if _is_hidden_matrix(apart, name, weight)]


def host_reads(optim: Optim, num_weights: int) -> int:
    """How often the host waits for the device in each step; in a skipped one only the first time.

    `torch.optim.Adafactor` reads the norms of each weight and of its update.
    """
    match optim:
        case Sgd() | Adam() | AdamW():
            return 0
        case AdamW8bit() | Muon():
            return 1
        case Adafactor():
            return 1 + 2 * num_weights
        case _:
            assert_never(optim)


def state_bytes(optim: Optim, named: Named, apart: Collection[str] = ()) -> int:
    """Bytes of the state that `build_optimizer` makes, by shapes and types alone.

    Args:
        named: as there; tensors without memory will do.
        apart: see `weights_apart`.
    """
    step = 4
    match optim:
        case Sgd():
            return sum(_bytes(weight) for _, weight in named) if optim.momentum else 0
        case Adam() | AdamW():
            return sum(step + 2 * _bytes(weight) for _, weight in named)
        case AdamW8bit():
            eight, others = _divided(named, partial(has_8bit_state, optim, apart))
            blocks = sum(-(-weight.numel() // BLOCK) for _, weight in eight)
            total = sum(step + 2 * _bytes(weight) for _, weight in others)
            total += 2 * sum(weight.numel() for _, weight in eight) + 2 * 4 * blocks
            table = 4 * 256  # from codes to numbers; one for each moment
            if optim.implementation == "torchao":
                return total + len(eight) * (step + 2 * table)
            return total + len(eight) * 8 + (2 * table if eight else 0)  # steps are int64
        case Adafactor():
            return sum(
                4 * sum(value.numel() for value in _factors(weight.to("meta")).values())
                for _, weight in named
            )
        case Muon():
            matrices, others = _divided(named, partial(_is_hidden_matrix, apart))
            total = sum(_bytes(weight) for _, weight in matrices)
            return total + sum(step + 2 * _bytes(weight) for _, weight in others)
        case _:
            assert_never(optim)


def held_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state, as it is in memory."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    if isinstance(optimizer, HostRead):
        tensors += optimizer.tables
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _groups(optim: Optim, named: Named) -> list[dict[str, Any]]:
    """The weights that decay, and those that do not."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, weight in named:
        # Norms, biases and other vectors keep their scale (He et al. 2019, section 3.1); so do
        # tables of biases, as Swin's.
        is_free = weight.ndim <= 1 or "bias" in name.rpartition(".")[2]
        (free if is_free or not optim.weight_decay else decayed).append(weight)
    return [
        {"params": members, "weight_decay": weight_decay}
        for members, weight_decay in ((decayed, optim.weight_decay), (free, 0.0))
        if members
    ]


def _fused(
    kind: type[torch.optim.Adam],
    optim: Adam | AdamW | AdamW8bit | Muon,
    named: Named,
    learning_rate: Tensor,
) -> torch.optim.Optimizer:
    groups = _groups(optim, named)
    optimizer = kind(groups, lr=learning_rate, betas=optim.betas, eps=optim.eps, fused=True)
    for _, weight in named:
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer


def _factors(weight: Tensor) -> dict[str, Tensor]:
    """Adafactor's state: of the last two dimensions one mean for each row and each column.

    Steps are counted on the host, which computes with them.
    """
    place = "meta" if weight.is_meta else "cpu"
    state = {"step": torch.zeros((), dtype=torch.float32, device=place)}
    if weight.ndim <= 1:
        return {**state, "variance": torch.zeros_like(weight)}
    *outer, rows, columns = weight.shape
    row_var = weight.new_zeros(*outer, rows, 1)
    return {**state, "row_var": row_var, "col_var": weight.new_zeros(*outer, 1, columns)}


def _is_hidden_matrix(apart: Collection[str], name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and name not in apart


def _divided(named: Named, belongs: Callable[[str, Tensor], bool]) -> tuple[Named, Named]:
    """Those for which `belongs(name, weight)` is true, and the others."""
    chosen = [(name, weight) for name, weight in named if belongs(name, weight)]
    names = {name for name, _ in chosen}
    return chosen, [(name, weight) for name, weight in named if name not in names]


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()
