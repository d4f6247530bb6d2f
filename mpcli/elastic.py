"""The launcher: starts the processes of a run, watches them, and starts them again.

Starting, the rendezvous and reaping are torch's elastic agent's. What it does not offer is here:
each restart is an attempt of its own, the count of restarts begins again with every checkpoint, a
rank that does not die is killed soon, and of many failures the one that caused the others is told.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mpcli import signals
from mpcli.checkpoint.layout import completed
from mpcli.launch import (
    Ending,
    ended_by,
    finish,
    problem_of,
    recorded,
    smaller_after,
    stopped,
)
from mpcli.meeting import Meeting
from mpcli.progress import Progress
from mpcli.recipe.engine import Local
from mpcli.recipe.errors import Exit, Problem, UserError
from mpcli.recipe.plugin import PluginFile
from mpcli.recipe.recipe import Recipe
from mpcli.records import Heartbeat, Plan, RankFailure, Result
from mpcli.rundir import RunDirectory

LOOK = 0.1
"""Seconds between two looks at the processes."""
GRACE = 2.0
"""Seconds that the others have to end by themselves when one is gone."""
_TORCHS_GRACE = 4
"""The same for what has no heartbeat yet, so that only torch's agent can kill it."""

_ENDS = {
    signal.SIGTERM: ("preempted", Exit.PREEMPTED),
    signal.SIGINT: ("interrupted", Exit.INTERRUPTED),
}


def supervise(
    run: RunDirectory,
    recipe: Recipe,
    plan: Plan,
    environment: Mapping[str, Any],
    tell: Callable[[str], None],
    plugin: PluginFile | None = None,
    meeting: Meeting | None = None,
) -> Result:
    """Train what the run directory says in processes of their own, and say how that ended.

    Args:
        environment: of the attempts to come.
        tell: shows a line to the person.
        meeting: with the launchers of other machines, of which this is the chief.
    """
    processes = plan.world_size // (meeting.nodes if meeting else 1)
    began = time.monotonic()
    with signals.handled(), signals.held(), _quiet_torch(), _variables(processes):
        try:
            ending = _attempts(run, recipe, plan, environment, tell, plugin, meeting)
        except (UserError, KeyboardInterrupt) as error:  # of the meeting: it is over
            ending = ended_by(error)
        return run.result() or _finish(run, recipe, ending, began)


def _attempts(
    run: RunDirectory,
    recipe: Recipe,
    plan: Plan,
    environment: Mapping[str, Any],
    tell: Callable[[str], None],
    plugin: PluginFile | None,
    meeting: Meeting | None,
) -> Ending:
    """How the last attempt ended, unless the result of its ranks says so.

    Raises:
        UserError: exit 6, the other launchers did not come, or one is gone.
        Stopped: while they came.
    """
    engine = recipe.engine
    assert not isinstance(engine, Local)
    restarts, newest = 0, _newest(run)
    if meeting:
        meeting.gather()
    while True:
        attempt = _begin(run, plan.world_size, plugin, meeting)
        attempt.watch()
        if meeting:
            meeting.finished()
        if result := run.result():
            return Ending(result.status, Exit(result.exit_code))
        found = attempt.error or root_cause(
            run.failures(), run.heartbeats(), plan.world_size, signals.asked()
        )
        if isinstance(found, Ending) and (smaller := smaller_after(found, recipe, plan)):
            plan, why = smaller
            tell(f"{why} (attempt {run.attempt + 1})")
            run.begin_attempt(recipe, plan, environment, [why])
            continue
        if isinstance(found, str):
            before, newest = newest, _newest(run)
            restarts = restarts + 1 if newest == before else 1
            if restarts <= engine.max_restarts:
                tell(f"{found}: the processes are started again (attempt {run.attempt + 1})")
                run.begin_attempt(recipe, plan, environment, [found])
                continue
            what = f"{found}; `engine.max_restarts` is {engine.max_restarts}"
            hint = "the log of each rank is in `attempts`; `mptrain run --resume` tries again"
            found = _ending(Exit.DISTRIBUTED, what, hint)
        if found.exit_code is Exit.BUG:
            tell(root_traceback(run))
        return found


def follow(
    meeting: Meeting, world_size: int, plugin: PluginFile | None
) -> tuple[Exit, str | None, RunDirectory | None]:
    """Start and watch this machine's processes as the chief says.

    Returns:
        the exit code of the run, why it is not 0, and the run if there was one.
    """
    processes = world_size // meeting.nodes
    run: RunDirectory | None = None
    with signals.handled(), signals.held(), _quiet_torch(), _variables(processes):
        try:
            while "exit_code" not in (order := meeting.order()):
                run = RunDirectory(Path(order["run"]), order["attempt"])
                _Attempt(run, processes, plugin, order["id"], meeting).watch()
                meeting.finished()
        except KeyboardInterrupt as error:  # while it waited for the chief
            return ended_by(error).exit_code, None, run
        return Exit(order["exit_code"]), order["reason"], run


def root_traceback(run: RunDirectory) -> str:
    """Of the bug that ended the run, with its rank and step."""
    failures = sorted(run.failures().items())
    first = next((failure for _, failure in failures if failure.traceback), None)
    if first is None:
        return ""
    return "\n".join([f"{_where(first.rank, first.step)}:", *first.traceback])


def conclude(run: RunDirectory, recipe: Recipe, world_size: int, began: float) -> Ending:
    """How a run ended whose ranks something else started, as one of them that failed.

    Rank 0 writes the result.

    Args:
        began: when this rank began, by the monotonic clock.
    """
    end = time.monotonic() + GRACE
    while time.monotonic() < end and len(run.failures()) < world_size:
        time.sleep(LOOK)  # the root of a failure may be told a moment later
    # A signal may be torchrun's, which sends it to those that are left.
    found = root_cause(run.failures(), run.heartbeats(), world_size)
    if isinstance(found, str):
        found = _ending(Exit.DISTRIBUTED, found, _HANG_HINT)
    if run.rank == 0:
        _finish(run, recipe, found, began)
    return found


def root_cause(
    failures: Mapping[int, RankFailure],
    heartbeats: Mapping[int, Heartbeat],
    world_size: int,
    asked: int | None = None,
) -> Ending | str:
    """Which of many failures caused the others, and what follows from it.

    Args:
        asked: signal to end that the launcher got.

    Returns:
        how the run ends, or why its processes are to be started again.
    """
    told = [failures[rank] for rank in sorted(failures)]
    killed = [failure for failure in told if failure.killed_by]
    own = [f for f in told if f.status == "failed" and not (f.lost_peer or f.killed_by)]
    stops = {failure.status for failure in told} & {"preempted", "interrupted"}
    if killed and asked is None:
        first = killed[0]
        return f"rank {first.rank} was killed by {first.killed_by} {_step(first.step)}"
    if own:
        return _own_failure(own, world_size)
    if any(failure.timed_out for failure in told):  # then a stop is by torch's agent, who ends all
        return _hang(told, heartbeats, world_size)
    if asked is not None:
        return stopped(preempted=asked == signal.SIGTERM)
    if stops:
        return stopped(preempted="preempted" in stops)
    if told:
        return f"{_where(told[0].rank, told[0].step)} lost the others"
    return _ending(Exit.DISTRIBUTED, "the processes ended, and nothing says why")


def _own_failure(own: list[RankFailure], world_size: int) -> Ending:
    first = own[0]
    shared = len(own) == world_size and all(f.problems == first.problems for f in own)
    prefix = "" if shared and not first.traceback else f"{_where(first.rank, first.step)}: "
    problems = [problem_of(problem) for problem in first.problems]
    named = tuple(
        Problem(prefix + p.what, p.hint, p.path, p.place, severity=p.severity, finding=p.finding)
        for p in problems
    )
    return Ending("failed", Exit(first.exit_code), named)


def _hang(told: list[RankFailure], heartbeats: Mapping[int, Heartbeat], world_size: int) -> Ending:
    silent = sorted({*range(world_size)} - {failure.rank for failure in told if failure.lost_peer})
    waited = next(failure for failure in told if failure.timed_out)
    who = f"rank {waited.rank} waited for `engine.timeout_seconds` {_step(waited.step)}"
    if not silent:
        return _ending(Exit.DISTRIBUTED, f"{who}, and so did all others", _HANG_HINT)
    steps = {rank: heartbeats[rank].step if rank in heartbeats else 0 for rank in silent}
    hanging = ", ".join(f"rank {rank} hangs {_step(step)}" for rank, step in steps.items())
    return _ending(Exit.DISTRIBUTED, f"{hanging}: {who}", _HANG_HINT)


_HANG_HINT = (
    "`mptrain run --resume` goes on from the newest checkpoint; where a step takes so long, raise "
    "`engine.timeout_seconds`"
)


def _ending(code: Exit, what: str, hint: str | None = None) -> Ending:
    return Ending("failed", code, (Problem(what, hint),))


def _step(step: int) -> str:
    return f"in step {step}" if step else "before step 1"


def _where(rank: int, step: int) -> str:
    return f"rank {rank} {_step(step)}"


def _newest(run: RunDirectory) -> int | None:
    """Step of the newest checkpoint."""
    return next((found.step for found in completed(run.checkpoints_path)), None)


def _finish(run: RunDirectory, recipe: Recipe, ending: Ending, began: float) -> Result:
    """Write the result of a run whose processes are gone: its records say what they did.

    Args:
        began: when they were started, by the monotonic clock.
    """
    progress = Progress(started=began)
    for row in run.steps():
        progress.add(row, recipe.precision.loss_scale)
    for evaluation in run.evaluations():
        progress.add_evaluation(evaluation.step, evaluation.metrics, recipe.output.keep_best)
    return finish(run, recipe, progress, ending)


def _begin(
    run: RunDirectory, world_size: int, plugin: PluginFile | None, meeting: Meeting | None
) -> _Attempt:
    """The processes of an attempt on all machines."""
    identity = str(uuid.uuid4())
    if meeting is None:
        return _Attempt(run, world_size, plugin, identity)
    meeting.tell(run=str(run.path.absolute()), attempt=run.attempt, id=identity)
    return _Attempt(run, world_size // meeting.nodes, plugin, identity, meeting)


class _Attempt:
    """The processes of this machine in one attempt.

    Attributes:
        error: why they could not be started.
    """

    def __init__(
        self,
        run: RunDirectory,
        processes: int,
        plugin: PluginFile | None,
        identity: str,
        meeting: Meeting | None = None,
    ) -> None:
        self.error: Ending | None = None
        self._run = run
        self._over = False  # whether the agent's thread has done its work
        self._processes = processes
        self._ranks: set[int] = set()  # of this machine, as far as they are known
        self._codes: dict[int, int] = {}  # exit codes other than 0, by rank
        self._killed: set[int] = set()  # by us
        self._told: dict[int, int] = {}  # signals to end that a process got, by its id
        self._deadline = float("inf")
        config = LaunchConfig(
            min_nodes=meeting.nodes if meeting else 1,
            max_nodes=meeting.nodes if meeting else 1,
            nproc_per_node=processes,
            run_id=identity,
            rdzv_backend="c10d",
            rdzv_endpoint=meeting.endpoint if meeting else "localhost:0",
            local_addr=None if meeting and not meeting.is_local else "localhost",
            max_restarts=0,
            monitor_interval=LOOK,
            shutdown_timeout=_TORCHS_GRACE,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )
        arguments = ["-P", "-u", "-m", "mpcli.worker", str(run.path)]
        arguments += ["--attempt", str(run.attempt), "--launcher", str(os.getpid())]
        arguments += ["--plugin", plugin.file] if plugin else []
        # torch's agent handles signals in the main thread only, where it would end the launcher.
        self._thread = threading.Thread(target=self._launch, args=(config, arguments), daemon=True)

    def watch(self) -> None:
        """Until all processes are gone; what became of them is in the run directory."""
        self._thread.start()
        while not self._over:  # `Thread.is_alive` is wrong after a Ctrl-C in `join`
            try:
                self._look()
                time.sleep(LOOK)
            except KeyboardInterrupt:  # a second Ctrl-C
                self._send(self._running(), signal.SIGINT)
                self._deadline = min(self._deadline, time.monotonic() + GRACE)
        self._record()

    def _launch(self, config: LaunchConfig, arguments: list[str]) -> None:
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            self._codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except Exception as error:
            what, *_ = str(error).splitlines() or [type(error).__name__]
            self.error = _ending(Exit.DISTRIBUTED, f"the processes cannot be started: {what}")
        finally:
            self._over = True

    def _look(self) -> None:
        running = self._running()
        if (number := signals.asked()) is not None:
            self._send({r: pid for r, pid in running.items() if pid not in self._told}, number)
            self._told |= dict.fromkeys(running.values(), number)
        if running and signals.save_asked():
            first = min(running)
            self._send({first: running[first]}, signal.SIGUSR1)
        now = time.monotonic()
        if self._is_broken(running):
            self._deadline = min(self._deadline, now + GRACE)
        if now >= self._deadline:
            self._killed |= running.keys()
            self._send(running, signal.SIGKILL)

    def _is_broken(self, running: Mapping[int, int]) -> bool:
        """Whether a rank is gone that had not ended with all others."""
        beats = self._heartbeats().values()
        gone = any(beat.state == "running" and beat.rank not in running for beat in beats)
        return gone or bool(self._run.failures())

    def _running(self) -> dict[int, int]:
        """Ids of the processes that are there, by rank."""
        return {rank: b.pid for rank, b in self._heartbeats().items() if _lives(b.pid)}

    def _heartbeats(self) -> dict[int, Heartbeat]:
        """Of the processes that are this launcher's."""
        if len(self._ranks) == self._processes:
            return self._run.heartbeats(self._ranks)
        here = (socket.gethostname(), os.getpid())
        beats = self._run.heartbeats()
        mine = {rank: b for rank, b in beats.items() if (b.host, b.launcher) == here}
        self._ranks |= mine.keys()
        return mine

    @staticmethod
    def _send(processes: Mapping[int, int], number: int) -> None:
        for pid in processes.values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _record(self) -> None:
        """Tell of the ranks that could not do it themselves."""
        known, beats = self._run.failures(), self._run.heartbeats()
        for rank, code in self._codes.items():
            if rank in known or rank in self._killed:
                continue
            if code == -signal.SIGKILL and known and rank not in beats:
                continue  # torch's agent killed it, which had not come yet when others ended
            step = beats[rank].step if rank in beats else 0
            number = signal.SIGTERM if code == Exit.PREEMPTED else signal.SIGINT
            ended: dict[str, Any] = {"exit_code": Exit.DISTRIBUTED}
            if code < 0:
                number = signal.Signals(-code)
            if code in (-signal.SIGTERM, -signal.SIGINT, Exit.PREEMPTED, Exit.INTERRUPTED):
                status, exit_code = _ENDS[number]
                ended = {"status": status, "exit_code": exit_code}
            elif code < 0:
                ended["killed_by"] = number.name
            else:
                ended["problems"] = [recorded(Problem(f"the process ended with exit code {code}"))]
            self._run.write_failure(RankFailure(rank=rank, step=step, **ended))


def _lives(pid: int) -> bool:
    """Whether a child of this process is there; one that the agent reaped is not its child."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        with suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False
    with suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


@contextmanager
def _variables(processes: int) -> Iterator[None]:
    """What the processes inherit, unless the person said otherwise."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cpus // processes)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """What torch's agent says of failures is told better."""
    loggers = [logging.getLogger(f"torch.distributed.{name}") for name in ("elastic", "launcher")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
