"""`final/`: the trained model, which other programs can load."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, assert_never

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mpcli.precision.formats import DTYPES
from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.errors import Problem
from mpcli.recipe.plugin import Plugin
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.task import ImageClassification, TextTask
from mpcli.records import TrainedOn, strict_json
from mpcli.tasks import transformers_folder
from mpcli.tasks.base import Dataset
from mpcli.tasks.image_loader import loader_text

WEIGHTS = "model.safetensors"


def write_final(
    folder: Path,
    recipe: Recipe,
    data: Any,
    model: nn.Module,
    state: Mapping[str, Tensor],
    metrics: Mapping[str, float],
) -> list[Problem]:
    """Fill `folder` with the weights, what builds the model elsewhere, and a card for people.

    Args:
        data: as it was read.
        model: whose names the weights have.
        state: the weights and buffers to save.
        metrics: of the last evaluation.

    Returns:
        A warning for each tensor that `output.final_dtype` cannot hold, which stays in fp32.

    Raises:
        OSError: the folder cannot be written.
    """
    tensors, problems = _converted(state, DTYPES[recipe.output.final_dtype])
    taken = TrainedOn()
    match recipe.task:
        case ImageClassification():
            _save(tensors, folder)
            taken = TrainedOn(
                mean=data.mean.tolist(),
                std=data.std.tolist(),
                num_classes=data.info.num_classes,
                classes=data.info.classes,
            )
            text = loader_text(recipe.task, data, model)
            (folder / "load.py").write_text(text, "utf-8")
        case TextTask():
            with _safetensors_errors():
                transformers_folder.save(tensors, data.info, model, folder)
            taken = TrainedOn(
                num_classes=data.info.num_labels or None, classes=data.info.label_names
            )
        case Plugin():
            _save(tensors, folder)
        case _:
            assert_never(recipe.task)
    (folder / "README.md").write_text(_card(recipe, data, model, metrics), "utf-8")
    about = {
        "task": recipe.task.model_dump(mode="json"),
        "weights": "average" if recipe.train.ema else "last",
        "dtype": recipe.output.final_dtype,
        "precision": recipe.precision.mode,
        "data": taken.model_dump(),
        "metrics": dict(metrics),
    }
    (folder / "model.json").write_text(strict_json(about, indent=2) + "\n", "utf-8")
    return problems


def _converted(
    state: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[Problem]]:
    """The tensors on the CPU, each in memory of its own; floating-point ones in `dtype`."""
    tensors, problems = {}, []
    for name, value in state.items():
        exact = value.detach().cpu()
        saved = exact.to(dtype) if exact.is_floating_point() else exact
        if saved.is_floating_point() and (saved.isinf() & exact.isfinite()).any():
            largest = exact[exact.isfinite()].abs().max().item()
            what = f"`{name}` has {largest:g}, too large for {dtype}: it is saved in fp32"
            problems.append(
                Problem(
                    what,
                    "use `final_dtype: fp32`",
                    path="output.final_dtype",
                    severity="warning",
                    finding="weights-exceed-fp16",
                )
            )
            saved = exact
        # A clone, for tied weights and views of one storage, which safetensors refuses.
        tensors[name] = saved.clone(memory_format=torch.contiguous_format)
    return tensors, problems


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    with _safetensors_errors():
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@contextlib.contextmanager
def _safetensors_errors() -> Iterator[None]:
    """What its writer makes of an OSError becomes one again."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


def _card(recipe: Recipe, data: Dataset, model: nn.Module, metrics: Mapping[str, float]) -> str:
    """What a person has to know who finds the folder."""
    weights = "average of the weights" if recipe.train.ema else "weights after the last step"
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        f"# {recipe.name}",
        "",
        f"{type(model).__name__} with {parameters:,} parameters, trained by mptrain: the "
        f"{weights}, in {recipe.output.final_dtype}.",
        "",
        f"- data: {data.num_train:,} samples to learn from, {data.num_eval:,} to evaluate on",
        f"- precision of the training: {recipe.precision.mode}",
        *_metric_lines(metrics),
        "",
        "The recipe, with every default:",
        "",
        "```yaml",
        resolved_yaml(recipe) + "```",
    ]
    return "\n".join(lines) + "\n"


def _metric_lines(metrics: Mapping[str, float]) -> Iterator[str]:
    for name, value in metrics.items():
        yield f"- {name} on the evaluation data: {value:.4f}"
