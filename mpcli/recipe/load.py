"""From a recipe file to a `Recipe`, or every problem in it at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from mpcli.recipe import nodes
from mpcli.recipe.base import Section
from mpcli.recipe.compose import compose, position
from mpcli.recipe.errors import Place, Problem, UserError, closest, one_of
from mpcli.recipe.fields import kinds
from mpcli.recipe.messages import validation_problems
from mpcli.recipe.packaged import templates
from mpcli.recipe.plugin import Plugin, PluginFile, blamed, lasting
from mpcli.recipe.recipe import Recipe, recipe_with
from mpcli.recipe.source import OVERRIDE, Source, read_source


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where each of its values comes from."""

    recipe: Recipe
    file: str  # as the user typed it
    source: str  # text of the file
    origins: Mapping[str, str]
    """Dotted path of every leaf -> `file:line:column`, `--set` or `default`."""
    dropped: tuple[str, ...]
    """What a later layer made meaningless, in words."""
    tree: nodes.Mapping = field(repr=False)
    plugin: PluginFile | None = None

    def place(self, path: str) -> Place | None:
        """The place of the value at a dotted path, or of the nearest section written around it."""
        parts = tuple(path.split("."))
        for end in range(len(parts), 0, -1):
            node = nodes.find(self.tree, parts[:end])
            if isinstance(node, nodes.Mapping):
                return nodes.key_place(self.tree, parts[:end])
            if node:
                return node.place
        return None


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), plugin: PluginFile | None = None
) -> LoadedRecipe:
    """Read, compose and validate a recipe.

    Args:
        path: the recipe file.
        overrides: `path=value` texts, as given to `--set`.
        plugin: the file whose task the recipe has.

    Raises:
        UserError: with every problem of the recipe, each at its place.
    """
    if str(path) == "":
        raise UserError(Problem("no recipe is named", "`mptrain init` lists recipes to copy"))
    return parsed_recipe(_read(Path(path), str(path)), Path(path).parent, overrides, plugin)


def parsed_recipe(
    source: Source,
    folder: Path,
    overrides: Sequence[str] = (),
    plugin: PluginFile | None = None,
) -> LoadedRecipe:
    """Compose and validate the text of a recipe.

    Args:
        source: the text.
        folder: where fragments of the author's own are looked for.
        overrides: `path=value` texts, as given to `--set`.
        plugin: the file whose task the recipe has.

    Raises:
        UserError: with every problem of the recipe, each at its place.
    """
    root, problems = nodes.parse(source)
    if root is None or (isinstance(root, nodes.Scalar) and root.value is None):
        raise source.error(0, 0, "the file holds no recipe", "`mptrain init` lists recipes to copy")
    if not isinstance(root, nodes.Mapping):
        hint = "a recipe is made of sections such as `optim:`; `mptrain init` lists recipes to copy"
        raise UserError(*problems, Problem("the file holds no sections", hint, place=root.place))
    composed = compose(root, overrides, folder)
    problems += composed.problems
    schema = recipe_with(plugin.module.Options) if plugin else Recipe
    data = _with_default_kinds(schema, nodes.plain(composed.tree))
    problems += _plugin_problems(data, composed.tree, plugin)
    try:
        with plugin.running() if plugin else nullcontext():  # its validators
            recipe = schema.model_validate(data)
        if plugin and isinstance(recipe.task, Plugin):
            problems += lasting(recipe.task)
    except UserError:
        raise
    except ValidationError as error:
        told = {p.place.start for p in problems if p.place}  # one problem of a value is enough
        found = validation_problems(error, schema, composed.tree, source.file)
        problems += [
            replace(p, hint="it was dropped with the old `kind`: set it beside the new one")
            if p.path in composed.dropped
            else p
            for p in found
            if p.path.split(".")[0] not in composed.lost and not (p.place and p.place.start in told)
        ]
    except Exception as error:
        raise (plugin and blamed(error, plugin)) or error from error
    if problems:
        raise UserError(*_in_order(problems, source.file))
    return LoadedRecipe(
        recipe=recipe,
        file=source.file,
        source=source.text,
        origins=dict(_origins(recipe.model_dump(mode="json"), composed.tree, ())),
        dropped=tuple(composed.dropped.values()),
        tree=composed.tree,
        plugin=plugin,
    )


class _Unread(Plugin):
    """Options of a plug-in that is not here: they are what they are."""

    model_config = ConfigDict(extra="allow")


def recorded_recipe(path: Path) -> Recipe:
    """The recipe that a run wrote; that of a plug-in too, of which no code is needed.

    Raises:
        UserError: it is no resolved recipe.
    """
    root = _recorded(path)
    schema = recipe_with(_Unread)
    try:
        return schema.model_validate(_with_default_kinds(schema, nodes.plain(root)))
    except ValidationError as error:
        raise UserError(*validation_problems(error, schema, root, str(path))) from error


def recorded_values(path: Path) -> dict[str, Any]:
    """The values of the recipe that a run wrote, also those that no schema of today knows.

    Raises:
        UserError: it is no recipe.
    """
    values: dict[str, Any] = nodes.plain(_recorded(path))
    return values


def _recorded(path: Path) -> nodes.Mapping:
    root, problems = nodes.parse(_read(path, str(path)))
    if problems or not isinstance(root, nodes.Mapping):
        raise UserError(*problems, Problem("it is no recipe", place=Place(str(path), 0, 0)))
    return root


def _plugin_problems(
    data: dict[str, Any], tree: nodes.Mapping, plugin: PluginFile | None
) -> Iterator[Problem]:
    """A plug-in without its file, whose fields nobody knows; or a file that nothing uses."""
    task = data.get("task")
    kind = task.get("kind") if isinstance(task, dict) else None
    place = nodes.key_place(tree, ("task", "kind"))
    if kind == "plugin" and not plugin:
        data["task"] = {"kind": kind}
        hint = "add `--plugin FILE`: only the command line names code"
        yield Problem("no file with the plug-in is named", hint, "task.kind", place)
    elif kind != "plugin" and plugin:
        hint = "write `task: {kind: plugin}`, or leave `--plugin` out"
        what = f"nothing uses the plug-in {plugin.file}"
        yield Problem(what, hint, "task.kind", place or nodes.key_place(tree, ("task",)))


def _read(path: Path, file: str) -> Source:
    try:
        return read_source(path, file)
    except FileNotFoundError:
        pass
    known = templates()
    if path.stem in known and path.parent == Path():
        hint = f"copy it here first: `mptrain init {path.stem}`"
    elif close := closest(path.stem, (b.stem for b in path.parent.glob("*.yaml")), cutoff=0.7):
        hint = f"did you mean `{path.with_name(f'{close}.yaml')}`?"
    elif close := closest(path.stem, known, cutoff=0.7):
        hint = f"did you mean the template `{close}`? Copy it here: `mptrain init {close}`"
    else:
        hint = f"`mptrain init` copies a recipe to begin with: {one_of(known)}"
    raise UserError(Problem("no such file", hint, place=Place(file, 0, 0)))


def _with_default_kinds(section: type[Section], data: dict[str, Any]) -> dict[str, Any]:
    """`data` with a `kind` where a section leaves it to the section's default."""
    filled = dict(data)
    for name, field_info in section.model_fields.items():
        value, known = data.get(name), kinds(field_info)
        if not known or not isinstance(value, dict):
            continue
        default = field_info.get_default(call_default_factory=True, validated_data=data)
        if "kind" not in value and isinstance(default, Section) and "" not in known:
            value = {"kind": getattr(default, "kind"), **value}  # noqa: B009 - of every such section
        kind = value.get("kind", "")
        inner = known.get("") or (known.get(kind) if isinstance(kind, str) else None)
        filled[name] = _with_default_kinds(inner, value) if inner else value
    return filled


def _in_order(problems: list[Problem], file: str) -> list[Problem]:
    """By place: the recipe's own first, overrides last; the first 50."""

    def order(problem: Problem) -> tuple[int, str, int, int]:
        place = problem.place or Place(file, 0, 0)
        rank = 0 if place.file == file else 2 if place.file == OVERRIDE else 1
        return rank, *place.start

    ordered = sorted(problems, key=order)
    if len(ordered) > nodes.MAX_PROBLEMS:
        rest = len(ordered) - nodes.MAX_PROBLEMS
        return [*ordered[: nodes.MAX_PROBLEMS], Problem(f"{rest:,} more problems are not shown")]
    return ordered


def _origins(value: Any, tree: nodes.Mapping, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and not any("." in key for key in value):
        for key, inner in value.items():
            yield from _origins(inner, tree, (*path, key))
    else:
        node = nodes.find(tree, path)
        yield ".".join(path), position(node.place) if node else "default"
