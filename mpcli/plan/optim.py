"""Whether the optimizer of a recipe can step here, and what the host waits for."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import torch

from mpcli.precision.numerics import numerics
from mpcli.recipe.engine import DeepSpeed, Fsdp2
from mpcli.recipe.errors import Exit, Problem
from mpcli.recipe.optim import Adam, AdamW, AdamW8bit, Muon, Sgd
from mpcli.recipe.recipe import Recipe


def optim_problems(recipe: Recipe, device: torch.device) -> Iterator[Problem]:
    """Why the optimizer cannot step as the recipe says, on this machine and with this engine."""
    optim = recipe.optim
    if isinstance(optim, Sgd | Adam | AdamW):
        return
    kind, engine = optim.kind, recipe.engine
    if isinstance(engine, Fsdp2 | DeepSpeed):
        yield Problem(
            f"`{kind}` steps whole weights, and `{engine.kind}` divides them among processes",
            "use `kind: adamw`, or `kind: ddp` in `engine`",
            path="optim.kind",
        )
    meaning = numerics(recipe.precision.mode)
    if meaning.half_weights and not meaning.masters:
        yield Problem(
            f"`{kind}` steps weights of 32 bits, and `{meaning.mode}` has none",
            f"use `kind: adamw`, or `mode: {meaning.compute_name}-master` in `precision`",
            path="optim.kind",
        )
    if isinstance(optim, AdamW8bit):
        yield from _package_problems(optim, device)


def extra_problems(package: str, path: str, otherwise: str = "") -> Iterator[Problem]:
    """That the package of an extra, which has its name, is not installed.

    Args:
        path: of the recipe, which asks for it.
        otherwise: what to do without it.
    """
    if not importlib.util.find_spec(package):
        yield Problem(
            f"the package {package} is not installed",
            f"pip install 'mptrain[{package}]'{otherwise}",
            path=path,
            exit_code=Exit.ENVIRONMENT,
        )


def _package_problems(optim: AdamW8bit, device: torch.device) -> Iterator[Problem]:
    package = optim.implementation
    yield from extra_problems(package, "optim.implementation")
    compiler = "g++" if device.type == "cpu" else "gcc"
    if package == "torchao" and not shutil.which(compiler):
        yield Problem(
            f"torchao compiles its step with torch.compile, which needs a compiler ({compiler}) "
            "on the PATH",
            "install one, or use `implementation: bitsandbytes`",
            path="optim.implementation",
            exit_code=Exit.ENVIRONMENT,
        )


def matrix_problems(recipe: Recipe, hidden_matrices: int) -> Iterator[Problem]:
    """Why the model is none for the optimizer.

    Args:
        hidden_matrices: see `mpcli.optim.hidden_matrices`.
    """
    if isinstance(recipe.optim, Muon) and not hidden_matrices:
        yield Problem(
            "this model has no matrices between embeddings and its last layer: `muon` would be "
            "`adamw`",
            "use `kind: adamw`",
            path="optim.kind",
        )
