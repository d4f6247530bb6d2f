"""One rank's part in a run of several: what has to be the same in all, and how it ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mpcli
from mpcli.launch import OUT_OF_MEMORY, Ending, ended_by, finish, recorded, trained
from mpcli.machine import environment, versions
from mpcli.plan.micro_batch import halved
from mpcli.position import Position
from mpcli.progress import Progress
from mpcli.ranks import Ranks, join, lost_peer, timed_out
from mpcli.recipe.changes import leaves
from mpcli.recipe.engine import Local
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.plugin import PluginFile
from mpcli.recipe.recipe import Recipe
from mpcli.records import EvalRecord, Plan, RankFailure, StepRecord
from mpcli.rundir import RunDirectory
from mpcli.trainer import Display

_TRACEBACK_LINES = 20


class Silent:
    """The display of all ranks but the first."""

    def start(self, plan: Plan, recipe: Recipe) -> None: ...
    def steps(self, rows: Sequence[StepRecord]) -> None: ...
    def evaluated(self, row: EvalRecord) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


def enter(place: Position, recipe: Recipe, plan: Plan, plugin: PluginFile | None) -> Ranks:
    """Join the group, after all ranks have found that they are to do the same.

    Raises:
        UserError: exit 2, in all ranks, they are not.
        RuntimeError: others did not come.
    """
    engine = recipe.engine
    assert not isinstance(engine, Local)
    device = torch.device(plan.device)
    if plan.device == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    same = facts(recipe, plan, plugin.sha256 if plugin else None)
    if recipe.train.micro_batch_size == "auto":  # each found its own: see `agreed`
        for name in ("micro_batch_size", "accumulation", "memory"):
            del same[f"plan.{name}"]
    return join(place, device, engine.timeout_seconds, same)


def agreed(ranks: Ranks, plan: Plan) -> Plan:
    """One plan of all that ranks made by themselves: of that with the smallest micro-batch."""
    return min(ranks.gathered(plan), key=lambda one: one.micro_batch_size)


def facts(recipe: Recipe, plan: Plan, plugin_sha256: str | None = None) -> dict[str, str]:
    """What has to be the same in all ranks, by name, as text."""
    # Warnings tell of the machine too: how many CPUs it has.
    planned = plan.model_dump(mode="json", exclude={"warnings"})
    return {
        **{name: json.dumps(value) for name, value in leaves(recipe.model_dump(mode="json"))},
        **{f"plan.{name}": json.dumps(value) for name, value in planned.items()},
        "the plug-in's SHA-256": str(plugin_sha256),
        "the SHA-256 of mptrain's code": _code_sha256(),
        "python": platform.python_version(),
        **{package: str(version) for package, version in versions().items()},
    }


def _code_sha256() -> str:
    digest = hashlib.sha256()
    folder = Path(mpcli.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


_RUN_KEY = "mptrain/run"


def begin_together(
    ranks: Ranks,
    place: Position,
    begin: Callable[[Plan], tuple[RunDirectory, Mapping[str, Any]]],
    recipe: Recipe,
    plan: Plan,
) -> RunDirectory:
    """The run directory of all ranks, which rank 0 makes, or goes on with.

    Where torchrun started the processes again, it goes on with the run that they had.

    Args:
        begin: makes the attempt otherwise.

    Raises:
        UserError: in all ranks, rank 0 could not.
    """
    run: RunDirectory | None = None
    told: tuple[str, int] | UserError | None = None
    if ranks.is_main:
        try:
            run = _restarted(ranks, place, recipe, plan) or begin(plan)[0]
            path = str(run.path.absolute())
            if place.agent and ranks.store:
                ranks.store.set(_RUN_KEY, path)
            told = path, run.attempt
        except UserError as error:
            told = error
    told = ranks.from_main(told)
    if isinstance(told, UserError):
        raise told
    assert told
    run = run or RunDirectory.join(Path(told[0]), told[1], ranks.rank)
    run.begin_heartbeat()
    return run


def _restarted(ranks: Ranks, place: Position, recipe: Recipe, plan: Plan) -> RunDirectory | None:
    if not (place.restarts and ranks.store and ranks.store.check([_RUN_KEY])):
        return None
    run = RunDirectory.open(Path(ranks.store.get(_RUN_KEY).decode()))
    why = f"the processes were started again by torchrun (restart {place.restarts})"
    before = run.plan()
    if before.world_size == plan.world_size:  # what it found out holds
        ended_so = any(_ran_out_of_memory(failure) for failure in run.failures().values())
        plan = (halved(recipe, before) if ended_so else None) or before
    run.begin_attempt(recipe, plan, environment(), [why])
    return run


def _ran_out_of_memory(failure: RankFailure) -> bool:
    return any(problem["finding"] == OUT_OF_MEMORY for problem in failure.problems)


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
