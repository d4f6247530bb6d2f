"""A task is a module: what is learnt, how its loss is counted, how it is evaluated."""

from __future__ import annotations

from typing import assert_never

from mpcli.recipe.plugin import Plugin
from mpcli.recipe.task import CausalLm, ImageClassification, MaskedLm, SequenceClassification
from mpcli.recipe.task import Task as TaskOptions
from mpcli.tasks import causal_lm, image_classification, masked_lm, sequence_classification
from mpcli.tasks.base import Dataset, Task
from mpcli.tasks.checkpointing import apply_activation_checkpointing
from mpcli.tasks.plugin import PluginTask

__all__ = ["Dataset", "Task", "apply_activation_checkpointing", "task_of"]


def task_of(options: TaskOptions) -> Task:
    """The module that carries out a recipe's `task`."""
    match options:
        case ImageClassification():
            return image_classification
        case MaskedLm():
            return masked_lm
        case CausalLm():
            return causal_lm
        case SequenceClassification():
            return sequence_classification
        case Plugin():
            return PluginTask(options.plugin)
        case _:
            assert_never(options)
