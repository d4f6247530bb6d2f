"""A step of a run once more, beside shadows in bf16 and fp32."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpcli import checkpoint
from mpcli.data.batch import Batch
from mpcli.diagnose.passes import (
    Moment,
    Pass,
    attention_rows,
    compared,
    differing,
    follow,
    module_rows,
    parting,
)
from mpcli.diagnose.stage import Stage, check_device
from mpcli.engines.local import LocalEngine
from mpcli.flight import finite_max
from mpcli.launch import explaining
from mpcli.precision.convert import convert
from mpcli.precision.numerics import autocast, numerics
from mpcli.precision.tape import RandomTape
from mpcli.precision.trace import ModuleTrace, first_defect
from mpcli.progress import may_mend
from mpcli.recipe.errors import Exit, user_error
from mpcli.recipe.load import load_recipe, recorded_recipe
from mpcli.recipe.plugin import PluginFile
from mpcli.recipe.precision import LossScale, Mode
from mpcli.recipe.recipe import Recipe
from mpcli.records import NonFiniteOrigin, Plan, Replay, ReplayedInput, StepRecord
from mpcli.rundir import RunDirectory
from mpcli.trainer import settings

logger = logging.getLogger(__name__)


def replay(
    run: RunDirectory,
    *,
    plugin: PluginFile | None = None,
    step: int | None = None,
    tell: Callable[[str], None] = logger.info,
) -> Replay:
    """Run a step again as it was, then in bf16 and fp32 from the same weights and random numbers.

    The state is that of the nearest checkpoint before the step, or fresh weights from the seed, and
    the steps from there on are run again; batch and random state of the step itself are those that
    the run kept of it, if it did. Shadows have the exact weights of the run, its fp32
    masters where it has any, and their gradients are not scaled. Where the loss is scaled, the
    run's own precision is tried at a scale of 1 too. Nothing is written to the run.

    Args:
        plugin: the file whose task the run has.
        step: attempted, from 1; None: the first non-finite step that a lower dynamic scale cannot
            mend, else the last.
        tell: what takes time.

    Raises:
        UserError: exit 2, the run is not ours or has no such step; 3, the run's device or data
            are missing, or memory; 4, its plan cannot be read; besides what a plug-in raises.
    """
    run.refuse_foreign("--replay ")
    recipe = load_recipe(run.recipe_path, plugin=plugin).recipe
    row, why = chosen_step(run, recipe.precision.loss_scale, step)
    past = RunDirectory(run.path, row.attempt if row else run.attempt)
    recipe = load_recipe(past.recipe_path, plugin=plugin).recipe
    with explaining(recipe.task):
        return _replayed(past, recipe, row, why, tell)


def chosen_step(
    run: RunDirectory, loss_scale: LossScale, step: int | None
) -> tuple[StepRecord | None, str]:
    """The row of the step to run again, and why that one; None: there are no rows yet.

    Raises:
        UserError: exit 2, the run has no such step.
    """
    last = broken = None
    for row in run.steps():
        if row.step == step:
            return row, "it was asked for"
        last = row
        if broken is None and is_bad(row) and not may_mend(loss_scale, row):
            broken = row
    if step is not None:
        there = f"there are the steps 1 to {last.step:,}" if last else "it has no steps yet"
        raise user_error(f"the run has no step {step:,}", there)
    if broken:
        return broken, "the first non-finite step that a lower loss scale cannot mend"
    return last, "the last step" if last else "the first step: there are no rows"


QUICK_SECONDS = 60.0
SHADOWS = 30
"""A replay takes about as long as so many steps: fp32, bf16, and twice the run's own precision, on
one thread of operations that are each looked at."""


def is_quick(run: RunDirectory) -> bool:
    """Whether a replay should take at most `QUICK_SECONDS`, by the time that most steps took."""
    recipe = recorded_recipe(run.recipe_path)
    row, _ = chosen_step(run, recipe.precision.loss_scale, None)
    if row is None:
        return True
    before = [found.step for found in checkpoint.completed(run.checkpoints_path)]
    start = max((step for step in before if step < row.step), default=0)
    speed = statistics.median(row.samples_per_second for row in run.steps())  # the first is slow
    per_step = recipe.train.global_batch_size / max(speed, 1e-9)
    return (row.step - start + SHADOWS) * per_step <= QUICK_SECONDS


def is_bad(row: StepRecord) -> bool:
    """Whether a step was skipped, or its loss is not finite."""
    return not row.applied or not math.isfinite(row.loss)


def _replayed(
    run: RunDirectory,
    recipe: Recipe,
    row: StepRecord | None,
    why: str,
    tell: Callable[[str], None],
) -> Replay:
    step, plan = row.step if row else 1, plan_of(run)
    check_device(plan)
    if not 1 <= step <= plan.steps:
        raise user_error(
            f"`steps.jsonl` has a row of step {step}, and the plan has {plan.steps:,} steps",
            "restore it from a copy of the run",
            exit_code=Exit.CHECKPOINT,
        )
    with settings(recipe, plan):
        tell(f"loading {plan.data_source}")
        stage = Stage(recipe, plan)
        start, again = stage.bring_to(run, step, tell)
        batch, flight_differs = stage.restore_flight(run, step, stage.batch(step))
        for part in flight_differs or ():
            tell(f"the {part} of step {step:,} is not what the run kept of it: taking what it kept")
        seen = _run_once(stage, batch)
        tell(f"comparing step {step:,} with bf16 and fp32")
        with _deterministic_kernels():
            tape = RandomTape()
            own = seen.follow_again(stage, seen.scale, tape)
            nondeterministic = differing(
                stage.model, own, seen.follow_again(stage, seen.scale, RandomTape())
            )
            shadows = {}
            if seen.scale != 1:
                shadows["unscaled"] = seen.follow_again(stage, 1.0, RandomTape(tape.draws))
            stage.give_exact_weights()
            tapes = [RandomTape(tape.draws), RandomTape(tape.draws)]
            shadows["fp32"] = seen.follow_shadow(stage, "fp32", tapes[0], attention=True)
            with _running_statistics(stage.exact) as used:
                statistics_loss = (
                    seen.follow_shadow(stage, "fp32", RandomTape(tape.draws)).loss if used else None
                )
            try:
                shadows["bf16"] = seen.follow_shadow(stage, "bf16", tapes[1])
            except RuntimeError as error:
                if "not implemented for" not in str(error):
                    raise
                tell(f"no shadow in bf16: {str(error).splitlines()[0]}")
    beside = compared(stage.model, own, shadows["fp32"])
    half = shadows.get("bf16")
    half_beside = compared(stage.model, half, shadows["fp32"]) if half else {}
    recorded = row.loss if row else None
    compute = numerics(recipe.precision.mode).compute_name
    # What was compiled, or added up over ranks, has other roundings.
    uncomparable = recorded is None or recipe.engine.compile or plan.world_size > 1
    return Replay(
        step=step,
        attempt=run.attempt,
        why=why,
        checkpoint=start.checkpoint.step if start.checkpoint else None,
        steps_again=again,
        mode=recipe.precision.mode,
        scale=seen.scale,
        loss=seen.loss,
        recorded_loss=recorded,
        reproduced=None if uncomparable else str(recorded) == str(seen.loss),
        finite=seen.finite,
        micro_batch=seen.number,
        micro_batches=seen.micro_batches,
        origin=seen.origin,
        shadow_losses={"run": own.loss, **{name: one.loss for name, one in shadows.items()}},
        shadow_origins={name: one.origin for name, one in shadows.items()},
        running_statistics_loss=statistics_loss,
        parting=parting(beside, compute),
        nondeterministic=tuple(nondeterministic),
        same_random_numbers=all(given.matched for given in tapes),
        flight_differs=flight_differs,
        modules=tuple(module_rows(stage.model, own, shadows["fp32"], beside, half_beside)),
        attention=tuple(attention_rows(shadows["fp32"])),
        inputs=tuple(_inputs(batch, stage.batch(step - 1 if step > 1 else 2))),
    )


@contextlib.contextmanager
def _running_statistics(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Inside, these modules of the model normalise by their running statistics."""
    norms = [
        m for m in model.modules() if m.training and getattr(m, "running_var", None) is not None
    ]
    for norm in norms:
        norm.eval()
    try:
        yield norms
    finally:
        for norm in norms:
            norm.train()


def _inputs(batch: Batch, neighbour: Batch) -> Iterator[ReplayedInput]:
    """Magnitudes of a step's batch, beside those of one that has nothing to do with it."""
    for name, tensor in batch.tensors.items():
        if tensor.is_floating_point():
            usual = neighbour.tensors.get(name)
            yield ReplayedInput(
                name=name,
                nan=int(tensor.isnan().sum()),
                inf=int(tensor.isinf().sum()),
                max=finite_max(tensor),
                usual_max=None if usual is None else finite_max(usual),
            )


def plan_of(run: RunDirectory) -> Plan:
    """The plan of an attempt.

    Raises:
        UserError: exit 4, it cannot be read.
    """
    try:
        return run.plan()
    except (OSError, ValueError) as error:
        raise user_error(
            f"the plan of attempt {run.attempt} cannot be read",
            "restore it from a copy of the run",
            exit_code=Exit.CHECKPOINT,
        ) from error


@dataclass(frozen=True)
class _Seen:
    """A step as the engine ran it, but for the update, and its micro-batch to look at closely.

    That is the first one with a non-finite value, or else the first one.
    """

    loss: float
    scale: float
    finite: bool  # the gradients of the whole step
    origin: NonFiniteOrigin | None
    micro_batch: Batch
    number: int
    micro_batches: int
    total_weight: int
    moment: Moment

    def follow_again(self, stage: Stage, scale: float, tape: RandomTape) -> Pass:
        """The micro-batch in the run's own precision."""
        return self._follow(stage, stage.model, scale, stage.engine.autocast, tape)

    def follow_shadow(
        self, stage: Stage, mode: Mode, tape: RandomTape, *, attention: bool = False
    ) -> Pass:
        """The micro-batch in another precision; fp32 before others, which convert the model."""
        precision = stage.recipe.precision.model_copy(update={"mode": mode})
        meaning, device = numerics(mode), stage.device
        convert(stage.exact, meaning, device, stage.plan.fp32_modules)
        with settings(stage.recipe.model_copy(update={"precision": precision}), stage.plan):
            region = autocast(meaning, device)
            return self._follow(stage, stage.exact, 1.0, region, tape, attention=attention)

    def _follow(
        self,
        stage: Stage,
        model: nn.Module,
        scale: float,
        region: contextlib.AbstractContextManager[object],
        tape: RandomTape,
        *,
        attention: bool = False,
    ) -> Pass:
        self.moment.give(model)
        batch, weight = self.micro_batch, self.total_weight
        return follow(model, stage.loss, batch, weight, scale, region, tape, attention=attention)


def _run_once(stage: Stage, batch: Batch) -> _Seen:
    """The step as the run ran it; what was compiled runs operation by operation."""
    engine, model = stage.engine, stage.model
    engine.compile, model._compiled_call_impl = False, None
    scale = float(engine.scaler.scale)
    parts = stage.micro_batches(batch)
    moments: list[Moment] = []
    losses, origin, chosen = [], None, 0
    for number, part in enumerate(parts):
        moment = Moment(model, stage.device)
        with ModuleTrace(model) as trace:

            def watched(model: nn.Module, part: Batch) -> tuple[Tensor, int]:
                loss, weight = stage.loss(model, part)
                trace.watch(loss)
                return loss, weight

            last = number + 1 == len(parts)
            losses.append(engine.accumulate(watched, part, batch.weight, last=last))
        found = trace.origin or in_sums(engine)
        if not moments or (found and not origin):
            moments, chosen, origin = [moment], number, found
    finite = in_sums(engine) is None
    for tensor in (*engine.masters, *engine.parameters):
        tensor.grad = None
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return _Seen(
        loss=float(loss),
        scale=scale,
        finite=finite,
        origin=origin,
        micro_batch=parts[chosen],
        number=chosen,
        micro_batches=len(parts),
        total_weight=batch.weight,
        moment=moments[0],
    )


def in_sums(engine: LocalEngine) -> NonFiniteOrigin | None:
    """The last parameter whose gradients, each finite, add up to something that is not."""
    for name, master in reversed(list(zip(engine.names, engine.masters, strict=True))):
        if master.grad is not None and (value := first_defect([master.grad])):
            return NonFiniteOrigin(
                module=name.rpartition(".")[0],
                phase="backward",
                value=value,
                operation="sum of micro-batches",
            )
    return None


@contextlib.contextmanager
def _deterministic_kernels() -> Iterator[None]:
    """Where there are any."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that have no other
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
