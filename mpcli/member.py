"""One rank's part in a run of several: what has to be the same in all, and how it ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mpcli
from mpcli.launch import Ending, ended_by, finish, recorded, trained
from mpcli.machine import versions
from mpcli.progress import Progress
from mpcli.ranks import Ranks, lost_peer, timed_out
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan, RankFailure
from mpcli.rundir import RunDirectory
from mpcli.trainer import Display

_TRACEBACK_LINES = 20


def facts(recipe: Recipe, plan: Plan, plugin_sha256: str | None = None) -> dict[str, str]:
    """What has to be the same in all ranks, by name, as text."""
    planned = plan.model_dump(mode="json")
    return {
        **{name: json.dumps(value) for name, value in _leaves(recipe.model_dump(mode="json"))},
        **{f"plan.{name}": json.dumps(value) for name, value in planned.items()},
        "the plug-in's SHA-256": str(plugin_sha256),
        "the SHA-256 of mptrain's code": _code_sha256(),
        "python": platform.python_version(),
        **{package: str(version) for package, version in versions().items()},
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of a recipe's values."""
    if not (isinstance(value, dict) and value):
        yield path, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{path}.{name}" if path else name)


def _code_sha256() -> str:
    digest = hashlib.sha256()
    folder = Path(mpcli.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def take_part(run: RunDirectory, recipe: Recipe, display: Display, ranks: Ranks) -> Ending:
    """Train as one of the ranks. What all decide together rank 0 writes as the run's result.

    What ends only this rank is written as its failure: of that the others will fail, and somebody
    has to find the root.
    """
    progress = Progress()
    ending = trained(recipe, run, display, progress, ranks)
    if ending.together or (ranks.alone and ending.status != "failed"):
        try:
            if ranks.is_main:
                finish(run, recipe, progress, ending)
            run.end_heartbeat()
            with contextlib.suppress(RuntimeError):  # the result is written: nobody is missed
                ranks.barrier()
            return ending
        except UserError as error:
            ending = ended_by(error)
    fail(run, ending)
    return ending


def fail(run: RunDirectory, ending: Ending) -> None:
    """Write that this rank ended by itself."""
    error, lines = ending.error, []
    if ending.exit_code is Exit.BUG and error:
        lines = "".join(traceback.format_exception(error)).splitlines()
    run.write_failure(
        RankFailure(
            rank=run.rank,
            step=run.step,
            status=ending.status,
            exit_code=ending.exit_code,
            problems=tuple(map(recorded, ending.problems)),
            traceback=tuple(lines[-_TRACEBACK_LINES:]),
            lost_peer=ending.exit_code is Exit.DISTRIBUTED and error is not None,
            timed_out=error is not None and lost_peer(error) and timed_out(error),
        )
    )
