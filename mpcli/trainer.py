"""The training loop, from the first step to the trained model."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mpcli import checkpoint
from mpcli.data.batch import Batch
from mpcli.engines.base import Engine
from mpcli.engines.local import LocalEngine
from mpcli.optim import learning_rate
from mpcli.outcomes import OutcomeLog
from mpcli.plan.precision import type_differences
from mpcli.precision.loss_scale import at_floor
from mpcli.precision.numerics import numeric_settings
from mpcli.recipe.base import parse_duration
from mpcli.recipe.errors import Problem
from mpcli.recipe.precision import LossScale
from mpcli.recipe.recipe import Recipe
from mpcli.records import EvalRecord, Plan, StepRecord, TrainingState
from mpcli.rundir import RunDirectory, storage_errors
from mpcli.signals import Stopped, check, released
from mpcli.tasks import apply_activation_checkpointing, task_of
from mpcli.tensorboard import TensorBoard

logger = logging.getLogger(__name__)


class Display(Protocol):
    """Who is told what happens while it happens."""

    def start(self, plan: Plan, recipe: Recipe) -> None: ...
    def steps(self, rows: Sequence[StepRecord]) -> None: ...
    def evaluated(self, row: EvalRecord) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class Diverged(Exception):
    """The numbers went wrong and the recipe says to stop.

    Args:
        finding: id of what `diagnose` would call it.
    """

    def __init__(self, what: str, finding: str | None = None) -> None:
        super().__init__(what)
        self.finding = finding


@dataclass
class Progress:
    """What is known of a run so far, also when it ends early."""

    attempted: int = 0
    applied: int = 0
    consecutive_skips: int = 0
    skips_at_floor: int = 0  # in a row, with the loss scale as low as it may be
    peak_memory_bytes: int = 0
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluated: int = 0  # the step after which `evaluation` was made
    seconds_before: float = 0.0  # of the attempts before this one, up to its checkpoint
    started: float = field(default_factory=lambda: time.monotonic())
    checkpoint: str | None = None  # the newest one, in the run directory
    warnings: list[Problem] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """That the run took so far."""
        return self.seconds_before + time.monotonic() - self.started

    def add(self, row: StepRecord, loss_scale: LossScale) -> None:
        """Count one attempted step."""
        self.attempted = row.step
        self.applied += row.applied
        self.consecutive_skips = 0 if row.applied else self.consecutive_skips + 1
        skipped_at_floor = not row.applied and at_floor(loss_scale, row.scale, row.step - 1)
        self.skips_at_floor = self.skips_at_floor + 1 if skipped_at_floor else 0
        self.peak_memory_bytes = max(self.peak_memory_bytes, row.memory_peak_bytes)
        self.recent_losses.append(row.loss)

    def state(self, steps: int, engine: Mapping[str, Any]) -> TrainingState:
        """What a checkpoint keeps of this.

        Args:
            steps: planned.
            engine: the engine's part.
        """
        return TrainingState(
            steps=steps,
            attempted=self.attempted,
            applied=self.applied,
            consecutive_skips=self.consecutive_skips,
            skips_at_floor=self.skips_at_floor,
            peak_memory_bytes=self.peak_memory_bytes,
            seconds=self.seconds,
            recent_losses=tuple(self.recent_losses),
            evaluation=self.evaluation,
            evaluated=self.evaluated,
            engine=dict(engine),
        )

    def restore(self, state: TrainingState, checkpoint: str) -> None:
        """Become what `state` was taken of."""
        self.attempted = state.attempted
        self.applied = state.applied
        self.consecutive_skips = state.consecutive_skips
        self.skips_at_floor = state.skips_at_floor
        self.peak_memory_bytes = state.peak_memory_bytes
        self.recent_losses.extend(state.recent_losses)
        self.evaluation = state.evaluation
        self.evaluated = state.evaluated
        self.seconds_before = state.seconds
        self.checkpoint = checkpoint

    def metrics(self) -> dict[str, dict[str, float]]:
        """`train.loss` is the mean raw loss of the last 50 steps at most."""
        metrics = {}
        if self.recent_losses:
            mean = sum(self.recent_losses) / len(self.recent_losses)
            metrics["train"] = {"loss": mean}
        if self.evaluation:
            metrics["eval"] = self.evaluation
        return metrics


@dataclass
class Resumed:
    """What the engine goes on from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def train(
    recipe: Recipe,
    plan: Plan,
    run: RunDirectory,
    display: Display,
    progress: Progress,
    resumed: Resumed | None = None,
) -> None:
    """Train as planned; rows, evaluations, checkpoints and the final model go to the run directory.

    Args:
        progress: of the whole run, and so of `resumed`.

    Raises:
        Diverged: `train.on_nonfinite` or `train.max_consecutive_skips` ended the run, or what it
            ended with is not a trained model.
        Stopped: by a signal, after a checkpoint if there was anything to save.
    """
    with _settings(recipe, plan), contextlib.ExitStack() as stack:
        device = torch.device(plan.device)
        task, options = task_of(recipe.task), recipe.task
        display.message(f"loading {plan.data_source}")
        with released():
            data = task.load_data(options, recipe.data)
            data.prepare(device)
            torch.manual_seed(recipe.train.seed)
            model = task.build_model(options, data.info).to(device)
            if recipe.engine.activation_checkpointing:
                apply_activation_checkpointing(model)
            engine: Engine = LocalEngine(recipe, model, device, plan.steps, plan.fp32_modules)
            if resumed:
                engine.restore(resumed.tensors, resumed.state)
                resumed.tensors.clear()  # a copy of the whole state
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
        )
        board = None
        if recipe.output.tensorboard:
            board = TensorBoard(run.tensorboard_path, progress.attempted)
            stack.callback(board.close)

        def record(*, wait: bool = False) -> None:
            rows = log.collect(wait=wait)
            if not rows:
                return
            run.append_steps(rows)
            display.steps(rows)
            if board:
                board.steps(rows)
            reasons: list[Diverged] = []
            for row in rows:
                progress.add(row, recipe.precision.loss_scale)
                reasons += _divergence(recipe, row, progress)
            if reasons:
                raise reasons[0]

        def evaluate(step: int) -> None:
            record(wait=True)
            started = time.monotonic()
            with engine.evaluating() as weights:
                batches = _until_stopped(data.eval_batches(plan.micro_batch_size))
                progress.evaluation = task.evaluate(options, weights, batches)
            row = EvalRecord(
                step=step,
                attempt=run.attempt,
                ema=recipe.train.ema is not None,
                seconds=time.monotonic() - started,
                **progress.evaluation,
            )
            run.append_evaluation(row)
            progress.evaluated = step
            display.evaluated(row)
            if board:
                board.evaluated(row)
            progress.peak_memory_bytes = max(progress.peak_memory_bytes, engine.memory()[1])
            logger.info("step %d: evaluation %s", step, progress.evaluation)
            log.restart_clock()

        def save(step: int) -> None:
            record(wait=True)  # what diverged is not worth keeping
            if progress.checkpoint == f"checkpoints/step-{step}":
                return  # an evaluation at most was made since: it can be made again
            run.sync()
            tensors, state = engine.checkpoint()
            saved = checkpoint.save(
                run.checkpoints_path,
                step,
                tensors,
                progress.state(plan.steps, state).model_dump(),
                keep_last=recipe.output.keep_last,
            )
            progress.checkpoint = f"checkpoints/{saved.path.name}"
            logger.info("step %d: checkpoint", step)
            log.restart_clock()

        def finish_step(step: int) -> None:
            """What falls due after a step. Signals are obeyed here, where the state is whole."""
            try:
                check()
                if progress.evaluated < step and (step >= plan.steps or evaluation_due(step)):
                    evaluate(step)
            except Stopped:
                save(step)
                raise
            if step < plan.steps and checkpoint_due(step):
                save(step)
                check()

        stack.callback(_write_remaining, log, recipe, run, progress)
        display.start(plan, recipe)
        logger.info("training %d steps on %s", plan.steps, plan.device)
        loss_function = functools.partial(task.loss, options)
        evaluation_due, checkpoint_due = (
            _due(every, plan) for every in (recipe.eval.every, recipe.output.checkpoint_every)
        )
        compared = False
        if resumed:
            finish_step(progress.attempted)  # its evaluation may have been stopped
        for step in range(progress.attempted + 1, plan.steps + 1):
            batch = data.train_batch(recipe.train.seed, step - 1, recipe.train.global_batch_size)
            losses = [
                engine.accumulate(
                    loss_function, micro_batch, batch.weight, last=index == plan.accumulation
                )
                for index, micro_batch in enumerate(batch.split(plan.micro_batch_size), 1)
            ]
            if engine.observed and not compared:
                progress.warnings += _compare_types(plan, engine, run)
                compared = True
            outcome = engine.step()
            log.push(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), outcome)
            record()
            finish_step(step)

        if not progress.applied:
            what = "every step had NaN or infinite gradients: nothing was learnt"
            raise Diverged(what, "skip-storm")
        if not math.isfinite(progress.evaluation["loss"]):
            raise Diverged("the trained model's loss on the evaluation data is not finite")
        if recipe.output.checkpoint_every is not None:
            save(progress.attempted)  # more steps may follow one day
        _save_model(engine.state_dict(), recipe, plan, run)


def _until_stopped(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; a signal ends them between two."""
    for batch in batches:
        check()
        yield batch


def _compare_types(plan: Plan, engine: Engine, run: RunDirectory) -> list[Problem]:
    """Keep the types that the first step was computed in; warn where the plan said others."""
    observed = engine.observed or {}
    run.write_observed(observed)
    warnings = list(type_differences(plan.modules, observed))
    for warning in warnings:
        logger.warning("%s", warning.what)
    return warnings


def _due(every: str | None, plan: Plan) -> Callable[[int], bool]:
    """Whether an interval such as `2 epochs` ends with a step."""
    if every is None:
        return lambda step: False
    number, unit = parse_duration(every)
    if unit == "minute":
        last = time.monotonic()

        def minutes_passed(step: int) -> bool:
            nonlocal last
            now = time.monotonic()
            if now - last < 60 * number:
                return False
            last = now
            return True

        return minutes_passed
    steps = number * (plan.steps_per_epoch if unit == "epoch" else 1)
    return lambda step: step % steps == 0


def _divergence(recipe: Recipe, row: StepRecord, progress: Progress) -> Iterator[Diverged]:
    """Why the run has to end with this step, if it has to."""
    if row.applied:
        return
    if recipe.train.on_nonfinite == "stop":
        yield Diverged(
            f"step {row.step}: NaN or infinite gradients, and `train.on_nonfinite` is `stop`"
        )
    cause = (
        "the loss is finite, so the gradients overflow in backward"
        if math.isfinite(row.loss)
        else f"the loss itself is {row.loss}, so the trouble begins in forward"
    )
    if progress.skips_at_floor >= 2:
        yield Diverged(
            f"step {row.step}: the loss scale is at its floor ({row.scale:g}) and gradients are "
            f"still NaN or infinite; {cause}",
            "scale-collapse",
        )
    if progress.consecutive_skips >= recipe.train.max_consecutive_skips:
        yield Diverged(
            f"step {row.step}: {progress.consecutive_skips} steps in a row had NaN or infinite "
            f"gradients (scale {row.scale:g}); {cause}; `train.max_consecutive_skips` is "
            f"{recipe.train.max_consecutive_skips}",
            "skip-storm",
        )


def _write_remaining(
    log: OutcomeLog, recipe: Recipe, run: RunDirectory, progress: Progress
) -> None:
    """Steps that ran before the loop was left by an exception are records too."""
    rows = log.collect(wait=True)
    for row in rows:
        progress.add(row, recipe.precision.loss_scale)
    if rows:
        run.append_steps(rows)


def _save_model(state: Mapping[str, Tensor], recipe: Recipe, plan: Plan, run: RunDirectory) -> None:
    """`final/`: safetensors weights, and what is needed to build the model elsewhere."""
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    about = {
        "task": recipe.task.model_dump(mode="json"),
        "sample": plan.sample,
        "weights": "average" if recipe.train.ema else "last",
    }
    with storage_errors(run.path), run.replacing_final() as folder:
        try:
            safetensors.torch.save_file(tensors, folder / "model.safetensors")
        except SafetensorError as error:  # what its writer makes of an OSError
            raise OSError(errno.EIO, str(error)) from error
        (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")


@contextlib.contextmanager
def _settings(recipe: Recipe, plan: Plan) -> Iterator[None]:
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
