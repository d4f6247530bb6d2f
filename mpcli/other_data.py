"""An evaluation on other data: what the model took from its own comes from the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, assert_never

from mpcli.recipe.data import (
    Cifar10,
    Cifar100,
    Data,
    Datasets,
    Digits,
    ImageFolder,
    Normalise,
    PluginData,
    PretrainedTokenizer,
    Text,
)
from mpcli.recipe.errors import Exit, Problem, UserError, user_error
from mpcli.recipe.load import LoadedRecipe
from mpcli.recipe.plugin import Plugin
from mpcli.recipe.source import OVERRIDE
from mpcli.recipe.task import ModelConfig, TextTask
from mpcli.records import TrainedOn
from mpcli.rundir import RunDirectory

_TAKEN = ("normalise", "tokenizer", "label_names")


def from_final(run: RunDirectory, loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe of a run that began with a model of transformers, with `final` in its place.

    Config and tokenizer are there too, whatever has become of the place that they came from.
    """
    recipe = loaded.recipe
    began_with_weights = isinstance(recipe.task, TextTask) and not isinstance(
        recipe.task.model, ModelConfig
    )
    if not began_with_weights or not run.final_path.is_dir():
        return loaded
    final = str(run.final_path.absolute())
    task = recipe.task.model_copy(update={"model": None, "init_from": final})
    data = recipe.data.model_copy(update={"tokenizer": None})
    return replace(loaded, recipe=recipe.model_copy(update={"task": task, "data": data}))


def on_other_data(run: RunDirectory, loaded: LoadedRecipe) -> tuple[LoadedRecipe, TrainedOn]:
    """The recipe with what the run took from its training data; it needs none to train on.

    Args:
        loaded: the run's recipe, with other data.

    Raises:
        UserError: exit 2, the command line says otherwise, the task is a plug-in, of which nothing
            is known, or the run has no trained model yet; 3, the images have other channels; 4,
            the trained model cannot be read.
    """
    recipe = loaded.recipe
    if isinstance(recipe.task, Plugin):
        raise user_error(
            "what a plug-in took from its training data is not known",
            "name other data by options of the plug-in's own",
            path="data",
        )
    for name in _TAKEN:
        if getattr(recipe.data, name, None) is not None and (path := _overridden(loaded, name)):
            raise _error(loaded, "the model was trained with the run's own", "leave it out", path)
    trained_on = run.trained_on()
    data = _data(loaded, recipe.data, trained_on, str(run.final_path.absolute()))
    return replace(loaded, recipe=recipe.model_copy(update={"data": data})), trained_on


def _data(loaded: LoadedRecipe, data: Data, trained_on: TrainedOn, final: str) -> Data:
    match data:
        case Digits() | Cifar10() | Cifar100() | ImageFolder():
            if len(trained_on.mean) != data.CHANNELS:
                raise user_error(
                    f"the images have {data.CHANNELS} channels, and the run's "
                    f"{len(trained_on.mean)}",
                    "choose images like those that it was trained on",
                    path="data.kind",
                    exit_code=Exit.ENVIRONMENT,
                )
            normalise = Normalise(mean=trained_on.mean, std=trained_on.std)
            return data.model_copy(update={"normalise": normalise})
        case Text():
            path = _overridden(loaded, "path")
            if path and data.eval_path and not _overridden(loaded, "eval_path"):
                what = "the run is evaluated on the text of `eval_path`"
                raise _error(loaded, what, f"use `--set data.eval_path={data.path}`", path)
            # The text to evaluate on stands in for the one to train on, which need not be there.
            update: dict[str, Any] = {"path": data.eval_path or data.path}
        case Datasets():
            numbers = tuple(str(number) for number in range(trained_on.num_classes or 0))
            names = trained_on.classes or numbers or None
            update = {"train_split": data.eval_split, "label_names": names}
        case PluginData():
            raise AssertionError("only a plug-in has such data")
        case _:
            assert_never(data)
    tokenizer = PretrainedTokenizer(kind="pretrained", path=final)
    return data.model_copy(update={"tokenizer": tokenizer, **update})


def _overridden(loaded: LoadedRecipe, name: str) -> str | None:
    """The path of a field of `data`, or within it, that the command line sets."""
    path = f"data.{name}"
    for leaf, origin in loaded.origins.items():
        if origin == OVERRIDE and (leaf == path or leaf.startswith(f"{path}.")):
            return leaf
    return None


def _error(loaded: LoadedRecipe, what: str, hint: str, path: str) -> UserError:
    return UserError(Problem(what, hint, path).at(loaded.place(path)))
