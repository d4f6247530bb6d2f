"""A run directory -> its result. Every way a run can end is told here."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from mpcli.checkpoint.layout import completed
from mpcli.machine import Machine, detect_machine, environment
from mpcli.plan import make_plan
from mpcli.plan.capacity import Change, changes, changes_text
from mpcli.plan.memory import UnknownMemory
from mpcli.plan.memory_text import parts_text
from mpcli.plan.micro_batch import halved, needed, out_of_memory, release_memory, smaller
from mpcli.plan.precision import has_batch_norm
from mpcli.plan.processes import Group
from mpcli.progress import Diverged, Progress
from mpcli.ranks import ALONE, Ranks, lost_peer
from mpcli.recipe.errors import Exit, Place, Problem, UserError, user_error
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import Plugin, PluginFile, plugin_error
from mpcli.recipe.recipe import Recipe
from mpcli.recipe.render import problem_json
from mpcli.recipe.task import Task
from mpcli.records import MemoryPlan, Plan, Result, ResultProblem, Status
from mpcli.rundir import RunDirectory, storage_errors
from mpcli.signals import Stopped, handled, held
from mpcli.trackers.display import Tracked
from mpcli.trainer import Display, train

logger = logging.getLogger("mpcli")

OUT_OF_MEMORY = "out-of-memory"
"""Id of the finding."""


@dataclass(frozen=True)
class Ending:
    """How a training ended.

    Attributes:
        error: what was raised.
        together: in a group, whether all ranks end so, having decided it together.
    """

    status: Status
    exit_code: Exit
    problems: tuple[Problem, ...] = ()
    error: BaseException | None = None
    together: bool = True

    @property
    def too_large(self) -> Problem | None:
        """That there was no memory for a micro-batch."""
        path = "train.micro_batch_size"
        return next(
            (p for p in self.problems if (p.finding, p.path) == (OUT_OF_MEMORY, path)), None
        )


def launch(run: RunDirectory, display: Display, plugin: PluginFile | None = None) -> Result:
    """Train in this process what the run directory says, and write `result.json`.

    A later attempt goes on from the newest valid checkpoint, or from step 0 where there is none.
    Such an attempt is begun here when there was no memory for a micro-batch: with half of it.

    Args:
        plugin: the file whose task the run has.

    Raises:
        Exception: a bug (after `result.json` said `failed`, exit 1), or a `UserError` where
            even the result cannot be written.
    """
    with handled(), held(), _closing(run, display):
        recipe = load_recipe(run.recipe_path, plugin=plugin).recipe
        while True:
            with _logged(run, display):
                progress = Progress()
                ending = trained(recipe, run, display, progress)
                tried_next = smaller_after(ending, recipe, run.plan())
                if tried_next is None:
                    result = finish(run, recipe, progress, ending)
                    break
                plan, why = tried_next
                logger.warning("%s (attempt %d)", why, run.attempt + 1)
            release_memory()
            run.begin_attempt(recipe, plan, environment(), [why])
    if ending.error and ending.exit_code is Exit.BUG:
        raise ending.error
    return result


def smaller_after(ending: Ending, recipe: Recipe, plan: Plan) -> tuple[Plan, str] | None:
    """What is tried after an attempt that had no memory for a micro-batch, and why, in words.

    Returns:
        None where it ended otherwise, or there is no smaller micro-batch.
    """
    problem = ending.too_large
    half = halved(recipe, plan) if problem else None
    if problem is None or half is None:
        return None
    size = half.micro_batch_size
    why = f"{problem.what}; micro-batches of {size:,} instead of {plan.micro_batch_size:,}"
    if has_batch_norm(plan.modules):
        why += f", and BatchNorm's statistics are of {size:,} samples from here on"
    return half, why


@contextlib.contextmanager
def reported(run: RunDirectory, display: Display) -> Iterator[None]:
    """Write the log of this process in a block; afterwards run and display are closed."""
    with _closing(run, display), _logged(run, display):
        yield


@contextlib.contextmanager
def _closing(run: RunDirectory, display: Display) -> Iterator[None]:
    try:
        yield
    finally:
        run.close()
        display.close()


@contextlib.contextmanager
def _logged(run: RunDirectory, display: Display) -> Iterator[None]:
    with storage_errors(run.path):
        to_file = _LogFile(run.log_path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers = [to_file, _WarningsTo(display)]
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def trained(
    recipe: Recipe, run: RunDirectory, display: Display, progress: Progress, ranks: Ranks = ALONE
) -> Ending:
    """Train what the run directory says, as one of the ranks; every way to end is told here."""
    resume = run.attempt > 1
    with Tracked(display, run, progress) as shown:
        try:
            train(recipe, run.plan(), run, shown, progress, resume=resume, ranks=ranks)
            ending = Ending("done", Exit.DONE)
        except (Exception, KeyboardInterrupt) as error:
            ending = ended_by(error, recipe, training=run.step > 0)
        if recipe.output.trackers and ranks.is_main and ending.together:
            with contextlib.suppress(UserError):  # whoever writes it again says so
                _write_result(run, recipe, progress, ending)  # killed from here on, the run is over
        over = time.monotonic()
        shown.finish(ending.status)
        progress.started += time.monotonic() - over  # which is no time of the run
    return ending


def ended_by(
    error: BaseException, recipe: Recipe | None = None, *, training: bool = False
) -> Ending:
    """What it means that something was raised; the log has it all.

    Args:
        training: whether a step had begun.
    """
    match error:
        case Diverged():
            hint = (
                "`mptrain diagnose` with the run directory names the cause, the layer and the fix"
            )
            problem = Problem(str(error), hint, finding=error.finding)
            return Ending("diverged", Exit.NUMERICS, (problem,), error)
        case UserError():
            logger.info("what was raised", exc_info=error)
            return Ending("failed", error.exit_code, error.problems, error, together=False)
        case KeyboardInterrupt():
            together = isinstance(error, Stopped) and error.agreed
            preempted = isinstance(error, Stopped) and error.preempted
            return stopped(preempted=preempted, error=error, together=together)
    assert isinstance(error, Exception)
    if out_of_memory(error):  # before `lost_peer`: NCCL's is of the same type
        # As text, for the error's frames hold all that was trained.
        logger.info("what was raised\n%s", "".join(traceback.format_exception(error)))
        return Ending("failed", Exit.ENVIRONMENT, (_no_memory(error, training),), together=False)
    if lost_peer(error):  # wherever it passed through: a plug-in's file, say
        logger.error("another rank was lost", exc_info=error)
        first, *_ = str(error).splitlines() or [type(error).__name__]
        problem = Problem(f"another rank cannot be reached: {first}")
        return Ending("failed", Exit.DISTRIBUTED, (problem,), error, together=False)
    if told := explained(error) or (recipe and plugin_error(error, recipe.task)):
        logger.error("what was raised", exc_info=error)
        return Ending("failed", told.exit_code, told.problems, error, together=False)
    logger.error("a bug", exc_info=error)
    problem = Problem(f"{type(error).__name__}: {error}")
    return Ending("failed", Exit.BUG, (problem,), error, together=False)


def stopped(
    *, preempted: bool, error: BaseException | None = None, together: bool = True
) -> Ending:
    """The end by a signal."""
    hint = "`mptrain run --resume` with the run directory goes on"
    if preempted:
        problem = Problem("stopped by SIGTERM", hint)
        return Ending("preempted", Exit.PREEMPTED, (problem,), error, together)
    problem = Problem("stopped by Ctrl-C", hint)
    return Ending("interrupted", Exit.INTERRUPTED, (problem,), error, together)


def finish(run: RunDirectory, recipe: Recipe, progress: Progress, ending: Ending) -> Result:
    """Write `result.json`, and the end of the log."""
    result = _write_result(run, recipe, progress, ending)
    logger.info("%s%s", ending.status, f": {result.reason}" if result.reason else "")
    return result


def _write_result(run: RunDirectory, recipe: Recipe, progress: Progress, ending: Ending) -> Result:
    reason = "; ".join(problem.what for problem in ending.problems) or None
    problems = (told for problem in ending.problems for told in _helped(problem, recipe, run))
    told = (*problems, *progress.warnings, *filter(None, [run.lost]))
    newest = next((found.step for found in completed(run.checkpoints_path)), None)
    result = Result(
        status=ending.status,
        exit_code=ending.exit_code,
        reason=reason,
        name=recipe.name,
        steps_attempted=progress.attempted,
        steps_applied=progress.applied,
        steps_skipped=progress.attempted - progress.applied,
        metrics=progress.metrics(),
        wall_seconds=progress.seconds,
        input_share=progress.input_share,
        peak_memory_bytes=progress.peak_memory_bytes,
        checkpoint="final" if ending.status == "done" else run.checkpoint_name(newest),
        best_checkpoint=run.checkpoint_name(progress.best[0] if progress.best else None),
        problems=tuple(map(recorded, told)),
    )
    run.write_result(result)
    return result


def _helped(problem: Problem, recipe: Recipe, run: RunDirectory) -> Iterator[Problem]:
    """A problem, and where there was no memory what helps: in the recipe, and by how much."""
    if problem.finding != OUT_OF_MEMORY:
        yield problem
        return
    plan = run.plan()
    size = smaller(recipe, plan)
    if size and problem.path == "train.micro_batch_size":
        hint = f"use `micro_batch_size: {size}`: it accumulates to the same global batch"
        yield replace(problem, hint=hint)
        return
    release_memory()
    memory, helps = None, ""
    try:
        if memory := needed(recipe, plan):
            helps = changes_text(memory, _changes(recipe, plan, run))
    except Exception:  # the result is worth more than advice
        logger.info("what would help is not known", exc_info=True)
    if memory is None:
        hint = "use `engine.activation_checkpointing: true`, half weights, or a smaller model"
        yield replace(problem, hint=hint)
        return
    yield replace(problem, hint=None)
    unknown = "no single change of the recipe is known to help: use a smaller model"
    yield Problem(parts_text(memory), helps or unknown, severity="warning")


def _changes(recipe: Recipe, plan: Plan, run: RunDirectory) -> list[Change]:
    """Of the recipe, with what is planned to be needed then."""
    plugin = recipe.task.plugin if isinstance(recipe.task, Plugin) else None
    machine = detect_machine()
    group = _same_processes(recipe, plan, machine)

    def plan_for(settings: tuple[str, ...]) -> MemoryPlan:
        same = f"train.micro_batch_size={plan.micro_batch_size}"
        changed = load_recipe(run.recipe_path, [same, *settings], plugin).recipe
        memory = make_plan(changed, machine, group=group, memory=True).memory
        if memory is None:
            raise UnknownMemory
        return memory

    return changes(recipe, plan, plan_for)


def _same_processes(recipe: Recipe, plan: Plan, machine: Machine) -> Group:
    """As many as a plan has, on as many machines as they came from."""
    each: int | str = recipe.engine.processes
    if isinstance(each, str):  # one for each GPU; of a CPU all are taken to be on one machine
        each = len(machine.cuda_devices) if plan.device == "cuda" else plan.world_size
    return Group(plan.world_size, max(1, plan.world_size // max(1, each)))


def recorded(problem: Problem) -> ResultProblem:
    """A problem as `result.json` has it.

    Of a plug-in's file only the name: where it lay may be the run directory.
    """
    about = problem_json(problem)
    name = about["file"] and Path(about["file"]).name
    return cast(ResultProblem, about | {"file": name})


def problem_of(told: ResultProblem) -> Problem:
    """The problem that `recorded` made this of."""
    place = None
    if told["file"]:
        place = Place(told["file"], told["line"] or 0, told["column"] or 0)
    return Problem(
        told["message"],
        told["hint"],
        told["path"] or "",
        place,
        severity=told["severity"],
        finding=told["finding"],
    )


class _LogFile(logging.FileHandler):
    """A log whose disk is full stays short; what must be said is said elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing."""


class _WarningsTo(logging.Handler):
    """Shows warnings to the person too."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        """One message."""
        if record.exc_info is None:  # a traceback is for the log
            self.display.message(record.getMessage())


@contextlib.contextmanager
def explaining(task: Task) -> Iterator[None]:
    """Raise what is no fault of the program, and what a plug-in raises, as a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if told := explained(error) or plugin_error(error, task):
            raise told from error
        raise


@contextlib.contextmanager
def explained_loss() -> Iterator[None]:
    """Raise as a `UserError` that the other ranks could not be reached."""
    try:
        yield
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        first, *_ = str(error).splitlines() or [type(error).__name__]
        hint = "start all ranks of the group at the same time, and look at what the others say"
        raise user_error(
            f"another rank cannot be reached: {first}", hint, exit_code=Exit.DISTRIBUTED
        ) from error


def _no_memory(error: BaseException, training: bool = True) -> Problem:
    """What torch had no memory for; before a step that is no micro-batch."""
    what, *_ = str(error).splitlines() or [type(error).__name__]
    hint = "lower `train.micro_batch_size`: gradients accumulate to the same global batch"
    return Problem(
        f"out of memory: {what}",
        hint if training else None,
        path="train.micro_batch_size" if training else "engine.device",
        finding=OUT_OF_MEMORY,
        exit_code=Exit.ENVIRONMENT,
    )


def explained(error: Exception) -> UserError | None:
    """What torch raises through no fault of the program, with its remedy."""
    text = str(error)
    if out_of_memory(error):
        return UserError(_no_memory(error))
    if missing := re.search(r'"(\w+)" not implemented for \'(Half|BFloat16)\'', text):
        kernel, half = missing.groups()
        return user_error(
            f"torch has no {half} kernel of {kernel} on this device",
            "choose another `precision.mode`, or list the layer in `precision.sensitive_layers`",
            path="precision.mode",
            exit_code=Exit.ENVIRONMENT,
        )
    if "Expected to have finished reduction in the prior iteration" in text:
        return user_error(
            "the loss does not depend on every parameter, and DistributedDataParallel waits for "
            "the gradients of all",
            "use `find_unused_parameters: true`",
            path="engine.find_unused_parameters",
        )
    if "does not have a deterministic implementation" in text:
        return user_error(
            text.splitlines()[0],
            "use `train.deterministic: false`, or another model",
            path="train.deterministic",
        )
    return None
