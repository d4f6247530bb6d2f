"""What a resume may change in a run's recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mpcli.recipe.dump import written
from mpcli.recipe.errors import Problem, UserError, user_error
from mpcli.recipe.load import LoadedRecipe
from mpcli.recipe.recipe import Recipe

_SAME = "a resumed run is the same run: begin a new one for another recipe"
_ALLOWED = (
    *("train.epochs", "train.steps", "train.micro_batch_size"),
    *("eval.every", "probe", "output.checkpoint_every", "engine"),
)


def allowed_changes(before: Recipe, after: LoadedRecipe) -> list[str]:
    """The values that differ, as `path: old -> new`.

    Raises:
        UserError: exit 2, with each difference that makes it another run.
    """
    old, new = (recipe.model_dump(mode="json") for recipe in (before, after.recipe))
    changes = list(differences(old, new))
    refused = [
        Problem(f"the run has {shown(old)}, found {shown(new)}", _SAME, path)
        for path, old, new in changes
        if not _is_allowed(path)
    ]
    if refused:
        raise UserError(*(problem.at(after.place(problem.path)) for problem in refused))
    return [f"{path}: {shown(old)} -> {shown(new)}" for path, old, new in changes]


def refuse_kinds(before: Recipe, overrides: Sequence[str]) -> None:
    """Check what would begin a section anew: its fields would be missed, not what is wrong.

    Raises:
        UserError: exit 2, an override has another `kind` than the run, where it may not change.
    """
    old = before.model_dump(mode="json")
    for path, _, kind in (override.partition("=") for override in overrides):
        section: Any = old
        for key in path.split("."):
            section = section.get(key) if isinstance(section, dict) else None
        if path.endswith(".kind") and section not in (None, kind) and not _is_allowed(path):
            raise user_error(f"the run has {shown(section)}, found {shown(kind)}", _SAME, path=path)


def _is_allowed(path: str) -> bool:
    return any(path == allowed or path.startswith(f"{allowed}.") for allowed in _ALLOWED)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of a recipe's values, as JSON has them."""
    if not (isinstance(value, dict) and value):
        yield path, value
        return
    for name, inner in value.items():
        yield from leaves(inner, f"{path}.{name}" if path else str(name))


_NOTHING = object()


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of what differs in nested mappings."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield path, old, new
        return
    for key in {**old, **new}:
        inner = f"{path}.{key}" if path else key
        yield from differences(old.get(key, _NOTHING), new.get(key, _NOTHING), inner)


def shown(value: Any) -> str:
    """One of `differences`, for people."""
    if value is _NOTHING:
        return "nothing"
    return "a section" if isinstance(value, dict) else f"`{written(value)}`"
