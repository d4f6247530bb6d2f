"""From a path to the evidence there, whatever it is."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from mpcli.checkpoint import Checkpoint
from mpcli.checkpoint.layout import MANIFEST, STEP
from mpcli.diagnose.contents import (
    LEFT_ALONE,
    SUFFIXES,
    checkpoint_facts,
    file_facts,
    folder_facts,
    is_folder_of_weights,
)
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.facts import Facts
from mpcli.diagnose.run import run_evidence
from mpcli.recipe.errors import UserError, user_error
from mpcli.recipe.load import recorded_recipe
from mpcli.recipe.recipe import Recipe
from mpcli.rundir import RunDirectory

_HINT = (
    "name a run directory, one of its checkpoints, a folder of weights such as a Hugging Face "
    "checkpoint, or a `.safetensors`, `.bin`, `.pt` or `.pth` file"
)


def gather(path: Path, recipe: Recipe | None = None) -> Evidence:
    """The evidence in a run directory, a checkpoint, a folder of weights or a file of weights.

    Args:
        recipe: to look at beside weights that no run of ours says a recipe of.

    Raises:
        UserError: exit 2 for anything else, saying what was found; 4 for what cannot be read.
    """
    with _one_thread():
        if is_run(path):
            run = RunDirectory.read(path)
            return run_evidence(run, None if run.foreign() else recorded_recipe(run.recipe_path))
        return Evidence(_facts(path), recipe or _recipe_around(path))


def _recipe_around(path: Path) -> Recipe | None:
    """Of the run that a checkpoint lies in."""
    run = run_around(path)
    return recorded_recipe(RunDirectory.read(run).recipe_path) if run else None


def run_around(path: Path) -> Path | None:
    """The run of ours that a checkpoint lies in."""
    run = path.parent.parent
    return run if STEP.fullmatch(path.name) and (run / "recipe.yaml").is_file() else None


def _facts(path: Path) -> Facts:
    if path.is_dir():
        step = STEP.fullmatch(path.name)
        if step and os.path.lexists(path / MANIFEST):
            return checkpoint_facts(Checkpoint(path, int(step[1])))
        if is_folder_of_weights(path):
            return folder_facts(path)
        raise _nothing(path, _held_by(path))
    if not path.exists():
        is_link = path.is_symlink()
        raise _nothing(path, "is a link to nothing" if is_link else "no such file or folder")
    if not path.is_file():
        raise _nothing(path, "is neither a file nor a folder")
    for pattern, why in LEFT_ALONE.items():
        if Path(path.name).match(pattern):
            raise _nothing(path, f"is not read: {why}")
    if path.suffix not in SUFFIXES:
        raise _nothing(path, "is no file of weights")
    return file_facts(path)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces of tensors are too small for several threads: where a processor is busy, they wait for
    each other ten times as long as one alone takes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory, of ours or of a recorder."""
    return any((path / name).is_file() for name in ("recipe.yaml", "foreign.json"))


def _held_by(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"holds no run and no weights, but {', '.join(names[:5]) or 'nothing'}{more}"


def _nothing(path: Path, found: str) -> UserError:
    return user_error(f"{path}: {found}", _near(path) or _HINT)


def _near(path: Path) -> str | None:
    """What may have been meant: a run beside others, a checkpoint among others."""
    if (path / "latest").is_dir():
        return f"`{path / 'latest'}` is its newest run"
    checkpoints = {match[1]: entry for entry in path.glob("checkpoint-*")
                   if (match := re.fullmatch(r"checkpoint-([0-9]{1,18})", entry.name))}  # fmt: skip
    if not checkpoints:
        return None
    return f"`{checkpoints[max(checkpoints, key=int)]}` is its newest checkpoint"
