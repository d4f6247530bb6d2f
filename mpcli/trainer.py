"""The training loop, from the first step to the trained model."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from mpcli import checkpoint
from mpcli.data.batch import Batch
from mpcli.data.seeds import rank_seed
from mpcli.data.workers import BatchQueue
from mpcli.engines import build_engine
from mpcli.engines.base import Engine
from mpcli.evidence import Evidence
from mpcli.final import write_final
from mpcli.flight import forget_flights
from mpcli.intervals import saves_left, step_due, timer
from mpcli.optim.schedule import learning_rate
from mpcli.outcomes import OutcomeLog
from mpcli.plan.precision import type_differences
from mpcli.precision.numerics import numeric_settings
from mpcli.progress import Diverged, NonFinite, Progress, divergence, restore_newest
from mpcli.ranks import ALONE, Ask, Ranks, lost_peer
from mpcli.recipe.errors import Exit, Problem, user_error
from mpcli.recipe.recipe import Recipe
from mpcli.records import EvalRecord, Plan, RollbackRecord, StepRecord
from mpcli.rundir import RunDirectory, storage_errors
from mpcli.signals import Stopped, asked, check, released, save_asked, shared
from mpcli.tasks import apply_activation_checkpointing, task_of

logger = logging.getLogger(__name__)


class Display(Protocol):
    """Who is told what happens while it happens."""

    def start(self, plan: Plan, recipe: Recipe) -> None: ...
    def steps(self, rows: Sequence[StepRecord]) -> None: ...
    def evaluated(self, row: EvalRecord) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


def train(
    recipe: Recipe,
    plan: Plan,
    run: RunDirectory,
    display: Display,
    progress: Progress,
    *,
    resume: bool,
    ranks: Ranks = ALONE,
) -> None:
    """Train as planned; rows, evaluations, checkpoints and the final model go to the run directory.

    Several ranks run this together; the run directory of all but rank 0 writes nothing that is the
    whole run's. What one of them does in a step, all do.

    Args:
        progress: of the whole run, from its beginning.
        resume: go on from the newest checkpoint that can be used, if there is one.

    Raises:
        Diverged: `train.on_nonfinite` or `train.max_consecutive_skips` ended the run, or what it
            ended with is not a trained model.
        Stopped: by a signal, after a checkpoint if there was anything to save.
    """
    with settings(recipe, plan), contextlib.ExitStack() as stack:
        device = ranks.device(plan.device)
        task, options = task_of(recipe.task), recipe.task
        display.message(f"loading {plan.data_source}")
        with released():
            data = task.load_data(options, recipe.data)
            data.prepare(torch.device("cpu") if recipe.engine.data_workers else device)
            torch.manual_seed(recipe.train.seed)
            model = task.build_model(options, data.info).to(device)
            if recipe.engine.activation_checkpointing:
                apply_activation_checkpointing(model)
            engine = build_engine(recipe, model, device, plan.steps, plan.fp32_modules, ranks)
            if engine.library_config:
                run.write_library_config(recipe.engine.kind, engine.library_config)
            if ranks.rank:  # other random numbers than rank 0's
                torch.manual_seed(rank_seed(recipe.train.seed, ranks.rank, 0))
            resumed = resume and _go_on(recipe, plan, run, engine, progress, ranks)
            if resumed:
                display.message(f"going on from step {progress.attempted:,}")
            saver = _saver(recipe, plan, run, engine, progress, ranks)
        if not ranks.alone:
            ranks.barrier()  # from here on nobody obeys a signal alone
            stack.enter_context(shared())
        log = OutcomeLog(
            device,
            run.attempt,
            recipe.train.global_batch_size,
            lambda applied: learning_rate(
                recipe.optim.schedule, recipe.optim.lr, plan.steps, applied
            ),
            engine.memory,
            steps=progress.attempted,
            applied=progress.applied,
            lockstep=not ranks.alone,
        )
        evidence = Evidence(
            recipe,
            run,
            engine,
            data,
            device,
            lambda: task.build_model(options, data.info).to(device),
            ranks,
        )

        def record(*, wait: bool = False) -> None:
            rows = log.collect(wait=wait)
            if not rows:
                return
            reason = None
            for number, row in enumerate(rows, 1):
                progress.add(row, recipe.precision.loss_scale)
                evidence.add(row)
                reason = reason or next(divergence(recipe, row, progress), None)
                if isinstance(reason, NonFinite):
                    rows = rows[:number]  # what ran since then will be as if it never had
                    break
            run.append_steps(rows)
            evidence.write(progress.attempted, wait=wait or reason is not None)
            display.steps(rows)
            if reason:
                raise reason

        def evaluate(step: int) -> None:
            record(wait=True)
            started = time.monotonic()
            with engine.evaluating() as weights:
                batches = _until_stopped(data.eval_batches(plan.micro_batch_size), device, ranks)
                metrics = ranks.from_main(task.evaluate(options, weights, batches))
            progress.add_evaluation(step, metrics, recipe.output.keep_best)
            row = EvalRecord(
                step=step,
                attempt=run.attempt,
                ema=recipe.train.ema is not None,
                seconds=time.monotonic() - started,
                **metrics,
            )
            run.append_evaluation(row)
            display.evaluated(row)
            progress.peak_memory_bytes = max(progress.peak_memory_bytes, engine.memory()[1])
            logger.info("step %d: evaluation %s", step, metrics)
            log.restart_clock()

        def save(step: int, *, scheduled: bool = True) -> None:
            record(wait=True)  # what diverged is not worth keeping
            if scheduled:
                progress.scheduled = step
            run.sync()
            tensors, state = engine.checkpoint()
            saver.save(
                step, tensors, progress.state(plan.steps, state), keep=_kept(recipe, progress)
            )
            logger.info("step %d: checkpoint", step)
            log.restart_clock()

        def finish_step(step: int) -> None:
            """What falls due after a step. Signals are obeyed here, where the state is whole."""
            saver.finished()
            ask = _asked()
            ask |= Ask.SAVE if save_asked() else 0
            if ranks.is_main:  # whose clock counts
                ask |= Ask.EVALUATE_BY_TIME if evaluation_time() else 0
                ask |= Ask.SAVE_BY_TIME if checkpoint_time() else 0
                ask |= Ask.COLLECT if log.is_late() else 0
            ask = ranks.agree(ask)
            if ask & Ask.COLLECT:
                log.copy_soon()
            try:
                _stop(ask)
                due = step >= plan.steps or evaluation_due(step) or ask & Ask.EVALUATE_BY_TIME
                if progress.evaluated < step and due:
                    evaluate(step)
            except Stopped:
                save(step, scheduled=False)
                saver.finished(wait=True)
                raise
            if ranks.alone and save_asked():  # while it evaluated
                ask |= Ask.SAVE
            if step < plan.steps:
                is_best = progress.best is not None and progress.best[0] == step
                scheduled = checkpoint_due(step) or is_best or bool(ask & Ask.SAVE_BY_TIME)
                if scheduled or ask & Ask.SAVE:
                    save(step, scheduled=scheduled)
                    check()

        def go_back(found: NonFinite) -> int:
            """Take up the newest checkpoint after the step that was found, which is returned."""
            saver.finished(wait=True)
            # Those that signals asked for are passed over: without the signals they would not be.
            up_to = math.inf if progress.scheduled is None else progress.scheduled
            state, problems = restore_newest(
                run.checkpoints_path, engine, ranks, up_to=up_to, attempted=found.step
            )
            for problem in problems:
                progress.warn(problem)
            if state is None:
                what = f"step {found.step}: {found}, and there is no checkpoint to go back to"
                raise user_error(what, exit_code=Exit.CHECKPOINT)
            log.go_back(found.step, state.applied)
            evidence.go_back()
            progress.go_back(state, found)
            run.append_rollback(
                RollbackRecord(
                    step=found.step,
                    attempt=run.attempt,
                    checkpoint=state.attempted,
                    reason=str(found),
                )
            )
            return found.step

        queue = stack.enter_context(
            BatchQueue(
                data,
                recipe.train.seed,
                recipe.train.global_batch_size,
                plan.steps,
                device,
                recipe.engine.data_workers,
            )
        )
        stack.enter_context(saver)

        @stack.push
        def _(kind: object, error: BaseException | None, trace: object) -> None:
            # What a GPU does after the loss of a peer never ends: nobody may wait for it.
            if not (device.type == "cuda" and error and lost_peer(error)):
                _write_remaining(log, evidence, recipe, run, progress)

        display.start(plan, recipe)
        logger.info("training %d steps on %s", plan.steps, plan.device)
        loss_function = functools.partial(task.loss, options)
        intervals = recipe.eval.every, recipe.output.checkpoint_every
        evaluation_due, checkpoint_due = (step_due(every, plan) for every in intervals)
        evaluation_time, checkpoint_time = (timer(every) for every in intervals)
        compared = False
        if resumed:
            run.at_step(progress.attempted)
            finish_step(progress.attempted)  # its evaluation may have been stopped
        elif recipe.train.on_nonfinite == "rollback":
            save(0)
        step = progress.attempted
        while step < plan.steps:
            step += 1
            run.at_step(step)
            began = time.monotonic()
            try:
                batch = queue.batch(step - 1)
            except Stopped:
                finish_step(step - 1)  # saves, and leaves
                raise
            progress.input_seconds += time.monotonic() - began
            share = batch.share(ranks.rank, ranks.world_size)
            micro_batches = share.split(plan.micro_batch_size)
            evidence.before_step(step, loss_function, micro_batches, batch.weight)
            for index, micro_batch in enumerate(micro_batches, 1):
                last = index == len(micro_batches)
                engine.accumulate(loss_function, micro_batch, batch.weight, last=last)
            if engine.observed and not compared:
                _compare_types(plan, engine, run, progress)
                compared = True
            outcome = engine.step()
            log.push(outcome)
            evidence.after_step(step, outcome)
            try:
                record()
                finish_step(step)
            except NonFinite as found:
                step = go_back(found)
                finish_step(step)

        if not progress.applied:
            what = "every step had NaN or infinite gradients: nothing was learnt"
            raise Diverged(what, "skip-storm")
        if not math.isfinite(progress.evaluation["loss"]):
            raise Diverged("the trained model's loss on the evaluation data is not finite")
        best_is_last = progress.best and progress.best[0] == step
        if recipe.output.checkpoint_every is not None or best_is_last:
            save(step)  # more steps may follow one day
        learnt = engine.state_dict()
        if ranks.is_main:
            with storage_errors(run.path), run.replacing_final() as folder:
                metrics = progress.evaluation
                for problem in write_final(folder, recipe, data, model, learnt, metrics):
                    progress.warn(problem)
        saver.finished(wait=True)


def _go_on(
    recipe: Recipe,
    plan: Plan,
    run: RunDirectory,
    engine: Engine,
    progress: Progress,
    ranks: Ranks,
) -> bool:
    """Take engine, progress and rows back to the newest checkpoint, or rows to the beginning.

    Returns:
        whether there was a checkpoint.
    """
    state, problems = restore_newest(run.checkpoints_path, engine, ranks)
    for problem in problems:
        progress.warn(problem)
    if state is None:
        run.cut(0, 0)
        forget_flights(run, 0)
        what = "the run has no checkpoint yet: it begins again"
        progress.warn(Problem(what, severity="warning"))
        return False
    progress.restore(state)
    last_row = run.cut(state.attempted, state.evaluated)
    forget_flights(run, state.attempted)
    logger.info("attempt %d goes on from step %d", run.attempt, state.attempted)
    if last_row < state.attempted:
        what = f"steps.jsonl has no rows of the steps {last_row + 1} to {state.attempted}"
        progress.warn(Problem(what, "they cannot be made again", severity="warning"))
    if state.steps != plan.steps and state.attempted < plan.steps:
        what = (
            f"{plan.steps:,} steps instead of {state.steps:,}: from here on the learning rate "
            f"follows the schedule of {plan.steps:,} steps"
        )
        length = "epochs" if recipe.train.epochs else "steps"
        progress.warn(Problem(what, path=f"train.{length}", severity="warning"))
    return True


def _kept(recipe: Recipe, progress: Progress) -> set[int]:
    """Steps whose checkpoints stay, old as they are."""
    kept = {progress.best[0]} if progress.best else set()
    if recipe.train.on_nonfinite == "rollback" and progress.scheduled is not None:
        kept.add(progress.scheduled)
    return kept


def _until_stopped(batches: Iterator[Batch], device: torch.device, ranks: Ranks) -> Iterator[Batch]:
    """The batches on a device; a signal ends them between two."""
    for batch in batches:
        _stop(ranks.agree(_asked(), now=Ask.STOP))
        yield batch.to(device)


_STOPS = {signal.SIGTERM: Ask.TERMINATE, signal.SIGINT: Ask.INTERRUPT}


def _asked() -> int:
    """Whether this rank was told by a signal to stop."""
    number = asked()
    return Ask.NOTHING if number is None else _STOPS[signal.Signals(number)]


def _stop(ask: int) -> None:
    """End here if a rank was told to by a signal.

    Raises:
        Stopped: in every rank.
    """
    for number, flag in _STOPS.items():
        if ask & flag:
            raise Stopped(number, agreed=True)


def _saver(
    recipe: Recipe,
    plan: Plan,
    run: RunDirectory,
    engine: Engine,
    progress: Progress,
    ranks: Ranks,
) -> checkpoint.Saver:
    """What saves the checkpoints that the recipe asks for, for which there is room."""
    output = recipe.output
    tensors, _ = engine.checkpoint()
    if ranks.is_main:
        checkpoint.check_room(
            run.checkpoints_path,
            tensors,
            ranks,
            saves=saves_left(recipe, plan, progress.attempted),
            keep=output.keep_last + (output.keep_best is not None),
            final_bytes=4 * plan.parameters,
        )
    return checkpoint.Saver(
        run.checkpoints_path, output.keep_last, tensors, ranks, background=output.async_checkpoint
    )


def _compare_types(plan: Plan, engine: Engine, run: RunDirectory, progress: Progress) -> None:
    """Keep the types that the first step was computed in; warn where the plan said others."""
    observed = engine.observed or {}
    run.write_observed(observed)
    for warning in type_differences(plan.modules, observed):
        progress.warn(warning)


def _write_remaining(
    log: OutcomeLog, evidence: Evidence, recipe: Recipe, run: RunDirectory, progress: Progress
) -> None:
    """Steps that ran before the loop was left by an exception are records too."""
    rows = log.collect(wait=True)
    for row in rows:
        progress.add(row, recipe.precision.loss_scale)
        evidence.add(row)
    if rows:
        run.append_steps(rows)
        evidence.write(progress.attempted, wait=True)


@contextlib.contextmanager
def settings(recipe: Recipe, plan: Plan) -> Iterator[None]:
    """torch's global switches, put back afterwards."""
    benchmark = torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS demands it
    try:
        torch.use_deterministic_algorithms(recipe.train.deterministic)
        torch.backends.cudnn.benchmark = not recipe.train.deterministic
        with numeric_settings(recipe.precision, torch.device(plan.device)):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic)
