"""The score of a run's weights, on its own data or other, in its own precision or another."""

from __future__ import annotations

from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mpcli import checkpoint
from mpcli.data.image_dataset import ImageDataset
from mpcli.data.images import ImageInfo
from mpcli.engines.local import checkpoint_weights
from mpcli.final import WEIGHTS
from mpcli.launch import explaining
from mpcli.precision.convert import convert
from mpcli.precision.numerics import autocast, numerics
from mpcli.recipe.errors import Exit, user_error
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan, TrainedOn, TrainingState
from mpcli.rundir import RunDirectory
from mpcli.tasks import task_of
from mpcli.trainer import settings


class Weights(NamedTuple):
    """Weights and buffers by the names that the model gives them, and where they are from."""

    tensors: dict[str, Tensor]
    name: str  # in the run directory


def load_weights(run: RunDirectory, recipe: Recipe, wanted: str | None = None) -> Weights:
    """What a run has learnt.

    Args:
        recipe: the run's own.
        wanted: `best`, or the step of a checkpoint; None: `final`, or before there is one, the
            newest checkpoint.

    Raises:
        UserError: exit 2, the run has no such weights; 4, they cannot be read.
    """
    found = checkpoint.completed(run.checkpoints_path)
    if wanted is None and run.final_path.is_dir():
        try:
            return Weights(safetensors.torch.load_file(run.final_path / WEIGHTS), "final")
        except (OSError, SafetensorError) as error:
            what = f"final/{WEIGHTS} cannot be read: {error}"
            raise user_error(what, exit_code=Exit.CHECKPOINT) from error
    if not found:
        raise user_error(f"{run.path}: the run has no weights yet", "wait for its first checkpoint")
    step = found[0].step if wanted is None else _step(wanted, found[0])
    for chosen in found:
        if chosen.step == step:
            tensors, _ = checkpoint.load(chosen)
            weights = checkpoint_weights(tensors, recipe.train.ema)
            return Weights(weights, run.checkpoint_name(step) or "")
    steps = ", ".join(str(kept.step) for kept in found)
    raise user_error(f"no checkpoint of step {step}", f"there are those of the steps {steps}")


def _step(wanted: str, newest: checkpoint.Checkpoint) -> int:
    if wanted == "best":
        _, state = checkpoint.load(newest)
        best = TrainingState.model_validate(state).best
        if best is None:
            hint = "`output.keep_best` of a recipe keeps it"
            raise user_error("the run has no best checkpoint", hint)
        return best[0]
    if not wanted.isdecimal():
        raise user_error(f"--checkpoint {wanted}: expected `best`, or the number of a step")
    return int(wanted)


def evaluate(
    recipe: Recipe, plan: Plan, weights: Weights, trained_on: TrainedOn | None = None
) -> dict[str, float]:
    """The metrics of the evaluation data, computed as a run of `recipe` evaluates.

    Args:
        trained_on: what the model took from other data than these; None: these are its own.

    Raises:
        UserError: the weights are of another model, the data cannot be had or have other classes,
            or the machine is too small.
    """
    with explaining(recipe.task):
        return _evaluated(recipe, plan, weights, trained_on)


def _evaluated(
    recipe: Recipe, plan: Plan, weights: Weights, trained_on: TrainedOn | None
) -> dict[str, float]:
    device, meaning = torch.device(plan.device), numerics(recipe.precision.mode)
    task, options = task_of(recipe.task), recipe.task
    with settings(recipe, plan):
        data = task.load_data(options, recipe.data)
        if trained_on and isinstance(data, ImageDataset):
            _check_classes(data.info, trained_on)
        data.prepare(device)
        model = task.build_model(options, data.info)
        _fill(model, weights)
        model.to(device).eval()
        convert(model, meaning, device, plan.fp32_modules)
        if recipe.engine.compile:
            model.compile(dynamic=False)
        with torch.no_grad(), autocast(meaning, device):
            return task.evaluate(options, model, data.eval_batches(plan.micro_batch_size))


def _check_classes(info: ImageInfo, trained_on: TrainedOn) -> None:
    """The same labels have to mean the same."""
    found, known = info.classes, trained_on.classes
    if (info.num_classes, found) == (trained_on.num_classes, known):
        return
    unknown, missing = (
        [n for n in one if n not in other] for one, other in ((found, known), (known, found))
    )
    if unknown:
        what = f"the model does not know the class `{unknown[0]}`"
    elif missing:
        what = f"the class `{missing[0]}` of the model is missing"
    else:
        what = "the classes are in another order than the model's"
    raise user_error(
        f"{what}: {info.num_classes} here, and {trained_on.num_classes} in the model",
        f"the classes have to be the run's: {_listed(known)}",
        path="data",
        exit_code=Exit.ENVIRONMENT,
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names[:20]) + (", ..." if len(names) > 20 else "")


@torch.no_grad()
def _fill(model: nn.Module, weights: Weights) -> None:
    """Give a model its weights; of tied ones, one name is enough."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, []).append(name)
    for tensor, known in names.items():
        value = next((weights.tensors[name] for name in known if name in weights.tensors), None)
        if value is None or value.shape != tensor.shape:
            here = f"`{known[0]}` is {list(tensor.shape)} in the model"
            there = "missing" if value is None else f"{list(value.shape)}"
            raise user_error(
                f"{weights.name} is of another model: {here}, and {there} there",
                "the task has to be the run's own",
                exit_code=Exit.CHECKPOINT,
            )
        tensor.copy_(value)
