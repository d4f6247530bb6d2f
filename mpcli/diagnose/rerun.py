"""Some steps of a run once more, as its recipe says or a changed one, and what they show."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpcli.diagnose.passes import Moment, compared, follow
from mpcli.diagnose.replay import is_bad
from mpcli.diagnose.stage import TELL_EVERY, Stage
from mpcli.engines.base import Outcome
from mpcli.launch import explaining
from mpcli.precision.numerics import numeric_settings
from mpcli.precision.tape import RandomTape
from mpcli.progress import may_mend
from mpcli.recipe.precision import Precision
from mpcli.recipe.recipe import Recipe
from mpcli.records import LayerRecord, Plan, StepRecord
from mpcli.trainer import settings


class State(NamedTuple):
    """What to go on from: tensors of a checkpoint (None: fresh weights) after so many steps."""

    attempted: int
    tensors: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Rerun:
    """What steps gave.

    Attributes:
        rows: one for each step, in order.
        broken: steps whose loss is not finite, or which were skipped and a lower dynamic loss scale
            cannot mend.
        seconds: median of a step that was not looked at.
        peak_memory: bytes of the first step, as `Arm` says.
        lost: share of the elements that a gradient should move and an update left as they were,
            over the last quarter of the steps.
        flushed: share of the elements of parameters' gradients that are zero and not in an fp32
            shadow of the last step, mean over modules.
        errors: relative error of the output of each module beside that shadow.
    """

    rows: list[StepRecord]
    broken: int
    seconds: float
    peak_memory: int
    lost: float
    flushed: float
    errors: dict[str, float]

    @property
    def losses(self) -> list[float]:
        """Of all steps."""
        return [row.loss for row in self.rows]

    @property
    def last_losses(self) -> list[float]:
        """Of the last quarter of the steps, which tells where they got to."""
        return self.losses[-quarter(len(self.rows)) :]


def quarter(steps: int) -> int:
    """At least one step."""
    return max(1, steps // 4)


def run_steps(
    recipe: Recipe, plan: Plan, start: State, end: int, tell: Callable[[str], None]
) -> Rerun:
    """Run the steps after a state, up to attempted step `end`, in this process.

    A step with NaN or infinite gradients is skipped as in training, and nothing ends the rerun:
    neither `train.on_nonfinite` nor any other rule that stops a run or takes it back.

    Args:
        plan: of this very recipe.
        start: without the tensors of a loss scale that the recipe does not have.
        tell: how far it is, now and then.

    Raises:
        UserError: exit 3, memory or a kernel is missing; 4, the state does not fit the recipe;
            besides what a plug-in raises.
    """
    try:
        with explaining(recipe.task), settings(recipe, plan):
            return _rerun(Stage(recipe, plan), start, end, tell)
    finally:
        gc.collect()  # models hold themselves in a circle, and the next one needs the room
        if plan.device != "cpu":
            torch.cuda.empty_cache()


def _rerun(stage: Stage, start: State, end: int, tell: Callable[[str], None]) -> Rerun:
    engine, number = stage.engine, end - start.attempted
    if start.tensors is not None:
        engine.adopt(start.tensors, start.attempted)
    rows: list[StepRecord] = []
    updates: list[LayerRecord] = []
    seconds: list[float] = []
    memory: _PeakMemory | None = None
    told = time.monotonic()
    for step in range(start.attempted + 1, end + 1):
        is_sampled = step > end - quarter(number)
        if is_sampled:
            engine.sample()
        # The first step is not sampled, unless it is the only one.
        is_first = step == start.attempted + 1
        with _PeakMemory(stage) if is_first else nullcontext() as watched:
            memory = watched or memory
            began = time.perf_counter()
            loss, outcome = stage.run(step)
            rows.append(_row(stage, step, loss, outcome, began))
        if outcome.layers:
            updates += outcome.layers.records(step, 0) or ()
        if not is_sampled or not seconds:
            seconds.append(time.perf_counter() - began)
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            tell(f"{step - start.attempted:,} of {number:,} steps are run")
    assert memory is not None
    errors, flushed = _beside_fp32(stage, end)
    policy = stage.recipe.precision.loss_scale
    return Rerun(
        rows=rows,
        broken=sum(is_bad(row) and not may_mend(policy, row) for row in rows),
        seconds=statistics.median(seconds),
        peak_memory=memory.peak,
        lost=_lost(stage, updates),
        flushed=flushed,
        errors=errors,
    )


def _row(stage: Stage, step: int, loss: Tensor, outcome: Outcome, began: float) -> StepRecord:
    """Of a step that has just run; this waits for it."""
    now, peak = stage.engine.memory()
    return StepRecord(
        step=step,
        attempt=0,
        loss=float(loss),
        lr=float(stage.engine.lr),
        grad_norm=float(outcome.grad_norm),
        scale=float(outcome.scale),
        applied=not bool(outcome.found_inf),
        samples_per_second=stage.recipe.train.global_batch_size / (time.perf_counter() - began),
        memory_allocated_bytes=now,
        memory_peak_bytes=peak,
    )


def _lost(stage: Stage, rows: Iterable[LayerRecord]) -> float:
    """Mean over elements; 0 where weights are rounded stochastically, which loses none on average:
    what one step leaves out another makes up for.
    """
    if stage.recipe.precision.stochastic_rounding:
        return 0.0
    known = [(row.lost, row.elements) for row in rows if row.lost is not None]
    elements = sum(number for _, number in known)
    return sum(lost * number for lost, number in known) / elements if elements else 0.0


def _beside_fp32(stage: Stage, step: int) -> tuple[dict[str, float], float]:
    """The first micro-batch of a step beside fp32 from the weights as they are now.

    Returns:
        largest error of each module's outputs, and the share of gradients that was flushed.
    """
    model, engine = stage.model, stage.engine
    engine.compile, model._compiled_call_impl = False, None  # what is compiled runs no hooks
    batch = stage.batch(step)
    part = stage.micro_batches(batch)[0]
    scale, moment, tape = float(engine.scaler.scale), Moment(model, stage.device), RandomTape()
    own = follow(model, stage.loss, part, batch.weight, scale, engine.autocast, tape)
    stage.give_exact_weights()
    moment.give(stage.exact)
    again = RandomTape(tape.draws)
    with numeric_settings(Precision(), stage.device):
        fp32 = follow(stage.exact, stage.loss, part, batch.weight, 1.0, nullcontext(), again)
    errors: dict[str, float] = {}
    flushed = []
    for (name, _), call in compared(model, own, fp32).items():
        if call.outputs:
            errors[name] = max(errors.get(name, 0.0), call.outputs.seen.error)
        if call.parameters:
            flushed.append(call.parameters.seen.flushed)
    return errors, statistics.fmean(flushed) if flushed else 0.0


class _PeakMemory(TorchDispatchMode):
    """Most bytes that are held at once while it is entered; the weights are held before.

    The peak of a process only rises, whoever caused it, so on a CPU the storages of tensors are
    counted as they come and go.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = stage.device
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._now = self._peak = 0
        tensors, _ = stage.engine.checkpoint()
        state = (tensor for name, tensor in tensors.items() if not name.startswith("rng."))
        for tensor in (*state, *stage.engine.buffers_before):
            self._add(tensor)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place not in self._alive:
            self._alive[place] = weakref.ref(storage, lambda _: self._free(place, size))
            self._now += size
            self._peak = max(self._peak, self._now)

    def _free(self, place: int, size: int) -> None:
        del self._alive[place]
        self._now -= size
