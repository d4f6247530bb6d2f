"""A recipe with a suggestion in it, as its author would have written it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mpcli.diagnose.finding import Finding
from mpcli.recipe.base import Section
from mpcli.recipe.compose import EITHER
from mpcli.recipe.dump import resolved_yaml, written
from mpcli.recipe.edit import with_other, with_value
from mpcli.recipe.errors import UserError
from mpcli.recipe.load import load_recipe, parsed_recipe
from mpcli.recipe.plugin import PluginFile
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.source import Source


def overrides(causes: Sequence[Finding]) -> tuple[str, ...]:
    """`path=value` of every cause that has some; of two that set the same, the first cause's.

    Lists of sensitive layers are united. A suggestion that was tried and did not help is none, nor
    is that of an `info`.
    """
    chosen: dict[str, str] = {}
    for cause in causes:
        if cause.suggestion and cause.verified is not False and cause.severity != "info":
            settings = dict(setting.split("=", 1) for setting in cause.suggestion.set)
            if list(settings) == [_LAYERS] and _LAYERS in chosen:
                lists = [yaml.safe_load(value) for value in (chosen[_LAYERS], settings[_LAYERS])]
                chosen[_LAYERS] = written(list(dict.fromkeys([*lists[0], *lists[1]])))
            elif not any(_overlap(path, other) for path in settings for other in chosen):
                chosen |= settings
    return tuple(f"{path}={value}" for path, value in chosen.items())


_LAYERS = "precision.sensitive_layers"


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def repaired(
    recipe: Path, source: Path, settings: Sequence[str], folder: Path, plugin: PluginFile | None
) -> tuple[str, bool]:
    """The text of a recipe with other settings.

    Args:
        recipe: the resolved one.
        source: the text that it was written in; what `--set` changed then is changed in it too.
        settings: `path=value`.
        folder: where it will lie: fragments that it uses are looked for there.

    Returns:
        the text, and whether it is the author's own, comments kept. Where that cannot be (it uses
        fragments that do not lie beside `folder`), it is the resolved recipe.
    """
    wanted = load_recipe(recipe, settings, plugin).recipe
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            original = file.read()
        text = _edited(original.replace("\r\n", "\n"), wanted, folder, plugin)
    except (UserError, OSError):
        text = None
    if text is None:
        return resolved_yaml(wanted), False
    return (text.replace("\n", "\r\n") if "\r\n" in original else text), True


def _edited(text: str, wanted: Recipe, folder: Path, plugin: PluginFile | None) -> str | None:
    """The text with as few changes as make it mean `wanted`; None where none do."""
    for _ in range(2):  # a mode has defaults of its own, such as the loss scale's: then they differ
        text = _nearer(text, wanted, folder, plugin)
    # Not `==`: with a plug-in, every load makes another class of its options.
    return None if any(differences(_read(text, folder, plugin), wanted)) else text


def _nearer(text: str, wanted: Recipe, folder: Path, plugin: PluginFile | None) -> str:
    """The text with what differs from `wanted` changed."""
    changes = dict(differences(_read(text, folder, plugin), wanted))
    for path, value in changes.items():
        try:
            still = [name for name, _ in differences(_read(text, folder, plugin), wanted)]
        except UserError:  # between two changes that go together
            still = [path]
        if path not in still:
            continue
        if (other := _excluded(path)) in changes:
            gone, new = (path, other) if value is None else (other, path)
            text = with_other(text, gone, new[-1], changes[new])
        else:
            text = with_value(text, path, value)
    return text


def _excluded(path: tuple[str, ...]) -> tuple[str, ...] | None:
    """The path that cannot be set beside this one, such as `train.steps` beside `train.epochs`."""
    *section, key = path
    other = dict(EITHER.get(".".join(section), ())).get(key)
    return (*section, other) if other else None


def _read(text: str, folder: Path, plugin: PluginFile | None) -> Recipe:
    return parsed_recipe(Source("", text), folder, plugin=plugin).recipe


def differences(old: Section, new: Section) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths of what differs, and the new values; of a section of another kind, all of it."""
    for name in type(new).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if before == after:
            continue
        same = isinstance(before, Section) and isinstance(after, Section)
        if same and getattr(before, "kind", None) == getattr(after, "kind", None):
            for path, value in differences(before, after):
                yield (name, *path), value
        elif isinstance(after, Section):
            yield (name,), after.model_dump(mode="json", exclude_defaults=True)
        else:
            yield (name,), new.model_dump(mode="json")[name]
