"""A run directory -> its result. Every way a run can end is told here."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mpcli.checkpoint.layout import completed
from mpcli.progress import Diverged, Progress
from mpcli.recipe.errors import Exit, Problem, UserError, user_error
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import PluginFile, plugin_error
from mpcli.recipe.render import problem_json
from mpcli.recipe.task import Task
from mpcli.records import Result, Status
from mpcli.rundir import RunDirectory, storage_errors
from mpcli.signals import Stopped, handled, held
from mpcli.trainer import Display, train

logger = logging.getLogger("mpcli")


def launch(run: RunDirectory, display: Display, plugin: PluginFile | None = None) -> Result:
    """Train what the run directory says, and write `result.json`.

    A later attempt goes on from the newest valid checkpoint, or from step 0 where there is none.

    Args:
        plugin: the file whose task the run has.

    Raises:
        Exception: a bug (after `result.json` said `failed`, exit 1), or a `UserError` where
            even the result cannot be written.
    """
    with handled(), held():
        return _launch(run, display, plugin)


def _launch(run: RunDirectory, display: Display, plugin: PluginFile | None) -> Result:
    progress = Progress()
    recipe = load_recipe(run.recipe_path, plugin=plugin).recipe

    def finish(status: Status, code: Exit, problems: Sequence[Problem] = ()) -> Result:
        reason = "; ".join(problem.what for problem in problems) or None
        told = (*problems, *progress.warnings, *filter(None, [run.lost]))
        newest = next((found.step for found in completed(run.checkpoints_path)), None)
        result = Result(
            status=status,
            exit_code=code,
            reason=reason,
            name=recipe.name,
            steps_attempted=progress.attempted,
            steps_applied=progress.applied,
            steps_skipped=progress.attempted - progress.applied,
            metrics=progress.metrics(),
            wall_seconds=progress.seconds,
            input_share=progress.input_share,
            peak_memory_bytes=progress.peak_memory_bytes,
            checkpoint="final" if status == "done" else run.checkpoint_name(newest),
            best_checkpoint=run.checkpoint_name(progress.best[0] if progress.best else None),
            problems=tuple(map(_recorded, told)),
        )
        logger.info("%s%s", status, f": {reason}" if reason else "")
        run.write_result(result)
        return result

    with storage_errors(run.path):
        to_file = _LogFile(run.log_path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers = [to_file, _WarningsTo(display)]
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        plan = run.plan()
        train(recipe, plan, run, display, progress, resume=run.attempt > 1)
        return finish("done", Exit.DONE)
    except Diverged as diverged:
        hint = "`mptrain diagnose` with the run directory names the cause, the layer and the fix"
        return finish(
            "diverged", Exit.NUMERICS, [Problem(str(diverged), hint, finding=diverged.finding)]
        )
    except UserError as error:
        logger.info("what was raised", exc_info=True)
        return finish("failed", error.exit_code, error.problems)
    except KeyboardInterrupt as stopped:
        hint = "`mptrain run --resume` with the run directory goes on"
        if isinstance(stopped, Stopped) and stopped.preempted:
            return finish("preempted", Exit.PREEMPTED, [Problem("stopped by SIGTERM", hint)])
        return finish("interrupted", Exit.INTERRUPTED, [Problem("stopped by Ctrl-C", hint)])
    except Exception as error:
        if told := explained(error) or plugin_error(error, recipe.task):
            logger.exception("what was raised")
            return finish("failed", told.exit_code, told.problems)
        logger.exception("a bug")
        finish("failed", Exit.BUG, [Problem(f"{type(error).__name__}: {error}")])
        raise
    finally:
        run.close()
        display.close()
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _recorded(problem: Problem) -> dict[str, Any]:
    """Of a plug-in's file its name: where it lay may be the run directory."""
    about = problem_json(problem)
    return about | {"file": about["file"] and Path(about["file"]).name}


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


def explained(error: Exception) -> UserError | None:
    """What torch raises through no fault of the program, with its remedy."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return user_error(
            f"out of memory: {text.splitlines()[0]}",
            "lower `train.micro_batch_size`: gradients accumulate to the same global batch",
            path="train.micro_batch_size",
            exit_code=Exit.ENVIRONMENT,
        )
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
