"""The whole recipe."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Union, get_args

from pydantic import (
    AfterValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from mpcli.recipe.base import Section, mistake
from mpcli.recipe.data import Data
from mpcli.recipe.engine import Engine, Local
from mpcli.recipe.errors import one_of
from mpcli.recipe.eval import Eval
from mpcli.recipe.optim import Optim
from mpcli.recipe.output import Output
from mpcli.recipe.plugin import Plugin
from mpcli.recipe.precision import Precision
from mpcli.recipe.probe import Probe
from mpcli.recipe.task import Task
from mpcli.recipe.train import Train

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


def _check_name(name: str) -> str:
    if re.fullmatch(_NAME, name):
        return name
    allowed = "letters, digits, `.`, `_` and `-`, beginning with a letter or digit"
    if len(name) > 100:
        raise mistake(f"at most 100 characters, found {len(name)}", "shorten it")
    if "/" in name or "\\" in name:
        raise mistake("must not be a path", f"it names a folder below `runs`: use {allowed}")
    fitting = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")
    hint = f"such as `{fitting}`" if fitting else "such as `my-run`"
    raise mistake(f"may hold only {allowed}", hint)


class Recipe(Section):
    """Everything a run does. Each section may come from a fragment named in `use:`."""

    name: Annotated[str, AfterValidator(_check_name)] = Field(
        description="the run's folder: letters, digits, `.`, `_`, `-`; 100 at most",
        json_schema_extra={"pattern": f"^{_NAME}$"},
    )
    task: Task
    data: Data
    precision: Precision = Precision()
    optim: Optim
    train: Train
    eval: Eval = Eval()
    engine: Engine = Local(kind="local")
    probe: Probe = Probe()
    output: Output = Output()

    @model_validator(mode="after")
    def _data_for_the_task(self) -> Recipe:
        if not isinstance(self.task, Plugin) and self.data.kind not in self.task.DATA:
            what = f"`{self.data.kind}` has nothing that {self.task.kind} could learn from"
            raise mistake(what, f"choose {one_of(self.task.DATA)}", "data.kind")
        return self

    @model_validator(mode="after")
    def _something_to_go_back_to(self) -> Recipe:
        if self.train.on_nonfinite == "rollback" and self.output.checkpoint_every is None:
            raise mistake(
                "`rollback` goes back to a checkpoint, and none are made",
                "set `output.checkpoint_every`, such as `1 epoch`",
                "train.on_nonfinite",
            )
        return self


def recipe_with(plugin: type[Plugin]) -> type[Recipe]:
    """The schema of recipes whose `task` may be that of a plug-in."""

    def from_json(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        # Strict as everywhere, but where JSON has no such type (a tuple, an enum, a path) from what
        # it has instead.
        return (
            plugin.model_validate_json(json.dumps(value))
            if isinstance(value, dict)
            else validate(value)
        )

    shipped = [section for section in get_args(get_args(Task)[0]) if section is not Plugin]
    own = Annotated[plugin, WrapValidator(from_json)]  # type: ignore[valid-type]
    tasks = Annotated[Union[(*shipped, own)], Field(discriminator="kind")]  # type: ignore[valid-type]
    return create_model("Recipe", __base__=Recipe, task=(tasks, ...))
