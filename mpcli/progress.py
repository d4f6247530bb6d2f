"""What is known of a run on the host: its counts, its best evaluation, and why it has to end."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpcli import checkpoint
from mpcli.checkpoint import Checkpoint
from mpcli.engines.base import Engine
from mpcli.precision.loss_scale import at_floor
from mpcli.ranks import ALONE, Ranks
from mpcli.recipe.errors import Exit, Problem, UserError, one_of, user_error
from mpcli.recipe.precision import DynamicScale, LossScale
from mpcli.recipe.recipe import Recipe
from mpcli.records import StepRecord, TrainingState

logger = logging.getLogger(__name__)


class Diverged(Exception):
    """The numbers went wrong and the recipe says to stop.

    Args:
        finding: id of what `diagnose` would call it.
    """

    def __init__(self, what: str, finding: str | None = None) -> None:
        super().__init__(what)
        self.finding = finding


class NonFinite(Exception):
    """A step after which `train.on_nonfinite: rollback` goes back to a checkpoint."""

    def __init__(self, row: StepRecord) -> None:
        super().__init__(f"NaN or infinite gradients: {_cause(row)}")
        self.step = row.step


@dataclass
class Progress:
    """Everything a run counts, also when it ends early."""

    attempted: int = 0
    applied: int = 0
    consecutive_skips: int = 0
    skips_at_floor: int = 0  # in a row, with the loss scale as low as it may be
    rollbacks: int = 0
    peak_memory_bytes: int = 0
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluated: int = 0  # the step after which `evaluation` was made
    best: tuple[int, float] | None = None  # step and value of `output.keep_best`
    seconds_before: float = 0.0  # of the attempts before this one, up to its checkpoint
    input_seconds: float = 0.0  # of this attempt, in which the training waited for batches
    started: float = field(default_factory=lambda: time.monotonic())
    scheduled: int | None = None  # step of the newest checkpoint that no signal asked for
    warnings: list[Problem] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """That the run took so far."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def input_share(self) -> float:
        """Share of this attempt's time in which the training waited for batches."""
        return self.input_seconds / max(self.seconds - self.seconds_before, 1e-9)

    def add(self, row: StepRecord, loss_scale: LossScale) -> None:
        """Count one attempted step."""
        self.attempted = row.step
        self.applied += row.applied
        self.consecutive_skips = 0 if row.applied else self.consecutive_skips + 1
        skipped_at_floor = not row.applied and at_floor(loss_scale, row.scale, row.step - 1)
        self.skips_at_floor = self.skips_at_floor + 1 if skipped_at_floor else 0
        self.peak_memory_bytes = max(self.peak_memory_bytes, row.memory_peak_bytes)
        self.recent_losses.append(row.loss)

    def add_evaluation(self, step: int, metrics: dict[str, float], best: str | None) -> None:
        """Note an evaluation, and whether its metric `best` is better than ever before."""
        self.evaluation, self.evaluated = metrics, step
        if best is None:
            return
        if best not in metrics:
            known = one_of(metrics)
            what = f"the evaluation of this task has no `{best}`"
            raise user_error(what, f"it has {known}", path="output.keep_best")
        if not math.isfinite(metrics[best]):
            return
        better = min if best in ("loss", "perplexity") else max
        if self.best is None or better(metrics[best], self.best[1]) != self.best[1]:
            self.best = step, metrics[best]

    def state(self, steps: int, engine: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps of this: a `TrainingState`.

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
            rollbacks=self.rollbacks,
            peak_memory_bytes=self.peak_memory_bytes,
            seconds=self.seconds,
            recent_losses=tuple(self.recent_losses),
            evaluation=self.evaluation,
            evaluated=self.evaluated,
            best=self.best,
            scheduled=self.scheduled,
            engine=dict(engine),
        ).model_dump()

    def restore(self, state: TrainingState) -> None:
        """Become what `state` was taken of."""
        self.attempted = state.attempted
        self.applied = state.applied
        self.consecutive_skips = state.consecutive_skips
        self.skips_at_floor = state.skips_at_floor
        self.rollbacks = state.rollbacks
        self.peak_memory_bytes = state.peak_memory_bytes
        self.recent_losses.extend(state.recent_losses)
        self.evaluation = state.evaluation
        self.evaluated = state.evaluated
        self.best = state.best
        self.scheduled = state.scheduled
        self.seconds_before = state.seconds

    def go_back(self, state: TrainingState, found: NonFinite) -> None:
        """Have the weights of `state`; the attempted steps since then still count."""
        self.rollbacks += 1
        self.applied = state.applied
        self.consecutive_skips = self.skips_at_floor = 0
        what = (
            f"step {found.step}: {found}; the run goes on from the checkpoint of step "
            f"{state.attempted}, without the batches since then"
        )
        self.warn(Problem(what, severity="warning"))

    def warn(self, warning: Problem) -> None:
        """Tell it now, and in the result."""
        logger.warning("%s", warning.what)
        self.warnings.append(warning)

    def metrics(self) -> dict[str, dict[str, float]]:
        """`train.loss` is the mean raw loss of the last 50 steps at most."""
        metrics = {}
        if self.recent_losses:
            mean = sum(self.recent_losses) / len(self.recent_losses)
            metrics["train"] = {"loss": mean}
        if self.evaluation:
            metrics["eval"] = self.evaluation
        return metrics


def restore_newest(
    folder: Path,
    engine: Engine,
    ranks: Ranks = ALONE,
    *,
    up_to: float = math.inf,
    attempted: int | None = None,
) -> tuple[TrainingState | None, list[Problem]]:
    """Bring an engine to the newest checkpoint that is whole and fits it.

    Args:
        up_to: the last step that counts.
        attempted: steps that the engine counts then; default: those of the checkpoint.

    Returns:
        its state, None where no checkpoint was ever completed, and a warning for each one that
        cannot be used.

    Raises:
        UserError: exit 4, there are checkpoints and none can be used.
    """
    state = None

    def use(candidate: Checkpoint) -> None:
        nonlocal state
        tensors, found = checkpoint.load(candidate, hashes=ranks.is_main)
        read = _training_state(candidate, found)
        counts = {} if attempted is None else {"attempted": attempted}
        try:
            engine.restore(tensors, read.engine | counts)
        except UserError as error:
            raise _unusable(candidate, error.problems[0].what) from error
        state = read

    problems: list[Problem] = []
    chosen = None
    if ranks.is_main:
        chosen, problems = checkpoint.newest_valid(folder, use, up_to)
    chosen = ranks.from_main(chosen)
    if chosen and not ranks.is_main:  # rank 0 has compared its hashes
        use(chosen)
    return state, problems


def _training_state(candidate: Checkpoint, found: dict[str, Any]) -> TrainingState:
    try:
        state = TrainingState.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise _unusable(candidate, f"it holds no state of a run: {what:.200}") from error
    if state.attempted != candidate.step:
        raise _unusable(candidate, f"it is the state after step {state.attempted}")
    return state


def _unusable(candidate: Checkpoint, why: str) -> UserError:
    what = f"checkpoint {candidate.path.name} cannot be used: {why}"
    return user_error(what, exit_code=Exit.CHECKPOINT)


def divergence(recipe: Recipe, row: StepRecord, progress: Progress) -> Iterator[Exception]:
    """Why the run cannot go on after this step, if it cannot.

    Args:
        progress: with the row added.
    """
    if row.applied:
        return
    if recipe.train.on_nonfinite == "stop":
        yield Diverged(
            f"step {row.step}: NaN or infinite gradients, and `train.on_nonfinite` is `stop`"
        )
    if recipe.train.on_nonfinite == "rollback" and not may_mend(recipe.precision.loss_scale, row):
        if progress.rollbacks < recipe.train.max_rollbacks:
            yield NonFinite(row)
        yield Diverged(
            f"step {row.step}: NaN or infinite gradients again after {progress.rollbacks} "
            f"rollbacks, which is `train.max_rollbacks`; {_cause(row)}",
            "skip-storm",
        )
    if progress.skips_at_floor >= 2:
        yield Diverged(
            f"step {row.step}: the loss scale is at its floor ({row.scale:g}) and gradients are "
            f"still NaN or infinite; {_cause(row)}",
            "scale-collapse",
        )
    if progress.consecutive_skips >= recipe.train.max_consecutive_skips:
        yield Diverged(
            f"step {row.step}: {progress.consecutive_skips} steps in a row had NaN or infinite "
            f"gradients (scale {row.scale:g}); {_cause(row)}; `train.max_consecutive_skips` is "
            f"{recipe.train.max_consecutive_skips}",
            "skip-storm",
        )


def may_mend(loss_scale: LossScale, row: StepRecord) -> bool:
    """Whether a lower loss scale, which is coming, may keep the gradients finite."""
    falls = isinstance(loss_scale, DynamicScale) and not at_floor(
        loss_scale, row.scale, row.step - 1
    )
    return falls and math.isfinite(row.loss)


def _cause(row: StepRecord) -> str:
    if math.isfinite(row.loss):
        return "the loss is finite, so the gradients overflow in backward"
    return f"the loss itself is {row.loss}, so the trouble begins in forward"
