"""A recorder for any PyTorch loop: what happened in it, in a run directory."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mpcli.flight import keep_flight
from mpcli.machine import environment
from mpcli.precision.statistics import Samples
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recorder.describe import describe, stepped_parameters
from mpcli.recorder.step import StepFindings, Watched, WatchedStep
from mpcli.recorder.tensors import named_tensors, num_samples
from mpcli.records import (
    FlightRecord,
    ForeignRun,
    LayerRecord,
    LoopRecord,
    NonFiniteOrigin,
    Result,
    Status,
    StepRecord,
)
from mpcli.rundir import RunDirectory

logger = logging.getLogger("mpcli.recorder")

MAX_SEARCHES = 3
"""For the origin of losses that are not finite; and as many for that of gradients alone."""
MAX_EVENT_ROWS = 1000
"""Of `events.jsonl`: a loop that does something new in every step is as clear after so many."""


class Recorder:
    """Records a training loop that is not ours, without changing it.

    ```
    recorder = Recorder(model, optimizer, scaler, out="runs/mine")
    for batch in batches:
        with recorder.step(batch):
            ...  # one whole optimizer step
    recorder.close()
    ```
    It writes a run directory with `foreign.json`, which `mptrain diagnose` reads. Weights and
    random numbers (of torch, `random` and `numpy.random`) are those of the loop without it. A step
    costs one host read, of the loss and the norm of the gradients right before the optimizer;
    statistics and shadows (`precision/local_shadow.py`) are of sampled steps. When a loss or a
    gradient is not finite, the step's forward and backward are repeated on a copy of the model, to
    name the module that made the first NaN or infinity. What such a forward does outside of the
    model is done once more then: one that counts its calls in a global counts more after a step
    that was not finite.

    Args:
        model: as the loop calls it. Compiled models run as they are: only the loop is recorded.
        optimizer: of the model's parameters, or of fp32 copies of them (masters) that the loop
            makes by hand. One of accelerate brings its scaler along.
        scaler: a `torch.amp.GradScaler`, if the loop has one.
        out: the run directory, which is new or empty.
        every: steps from one sampled step to the next; the first one is sampled; 0: none is.
        steps_before: of a training that goes on; the first step recorded is the next one.
        loop, settings: of a framework, for `foreign.json`.

    Raises:
        UserError: exit 2 for an `out` that is not empty, a negative `every`, or something that is
            not a model with weights or an optimizer of torch's; 7 where `out` cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: Any = None,
        *,
        out: str | Path,
        every: int = 100,
        steps_before: int = 0,
        loop: str = "pytorch",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 0:
            raise user_error(f"every={every}: fewer than 0 steps", "`every=0` samples no step")
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            scaler = scaler or getattr(optimizer, "scaler", None)
            optimizer = inner
        _refuse_what_cannot_be_recorded(model, optimizer)
        parameters = stepped_parameters(model, optimizer)
        device = next((parameter.tensor.device for parameter in parameters), torch.device("cpu"))
        about = describe(
            model,
            optimizer,
            scaler,
            loop=loop,
            settings=settings or {},
            every=every,
            device=device,
        )
        self._run = _new_run(about, Path(out))
        self._name = Path(out).name
        self._watched = Watched(
            model, optimizer, scaler, parameters, device, compiled=about.compiled
        )
        self._every = every
        self._samples = Samples(device)
        self._started = time.perf_counter()
        self._step = self._steps_before = steps_before
        self._applied = 0
        self._searches = {True: 0, False: 0}  # by whether the loss was finite
        self._pattern: list[dict[str, Any]] = []  # of the events of the step before
        self._event_rows = 0
        self._table: list[LayerRecord] = []  # of the last sampled step
        self._loss = math.nan
        self._failure: BaseException | None = None
        self._is_open = True
        self._told_weights = False
        atexit.register(self._end_with_process)

    @contextlib.contextmanager
    def step(self, batch: Any = None) -> Iterator[None]:
        """Around one whole optimizer step: all of its micro-batches, and the update.

        Args:
            batch: what the step is made from, kept when it goes wrong; tensors in any nesting.

        Raises:
            UserError: exit 2, the recorder is closed.
        """
        if not self._is_open:
            raise user_error("this recorder is closed", "make a new one for another training")
        self._step += 1
        is_first = self._step == self._steps_before + 1
        is_sampled = bool(self._every) and (is_first or self._step % self._every == 0)
        watched = WatchedStep(
            self._watched,
            self._step,
            self._run.attempt,
            self._samples if is_sampled else None,
            observe=is_first,
            wants_origin=self._wants_origin,
        )
        self._failure = None
        try:
            with watched.watching():
                yield
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._watched.failures.safe(self._write)(watched, batch)

    def close(self, error: BaseException | None = None) -> None:
        """Write `result.json` and give the run directory back; nothing happens a second time.

        An exception that left the last step makes the run `failed`. A disk that is full, or gone,
        is told and raises nothing.

        Args:
            error: that ended the loop, between two steps.
        """
        error = self._failure or error
        if error is None:
            self._end("done", Exit.DONE, None)
        else:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            interrupted = isinstance(error, KeyboardInterrupt)
            status: Status = "interrupted" if interrupted else "failed"
            self._end(status, Exit.INTERRUPTED if interrupted else Exit.BUG, reason)

    def _end_with_process(self) -> None:
        """A loop that was left between two steps does not say why."""
        if self._failure is None:
            reason = "the process ended before the recorder was closed"
            self._end("failed", Exit.BUG, reason)
        self.close()

    def _end(self, status: Status, code: Exit, reason: str | None) -> None:
        if not self._is_open:
            return
        self._is_open = False
        atexit.unregister(self._end_with_process)
        self._failure = None  # with its traceback it would keep the model
        steps = self._step - self._steps_before
        result = Result(
            status=status,
            exit_code=code,
            reason=reason,
            name=self._name,
            steps_attempted=steps,
            steps_applied=self._applied,
            steps_skipped=steps - self._applied,
            metrics={"train": {"loss": self._loss}},
            wall_seconds=time.perf_counter() - self._started,
            peak_memory_bytes=self._memory()[1],
            checkpoint=None,
        )
        ends: tuple[Callable[[], None], ...] = (
            partial(self._run.write_result, result),
            self._run.close,
        )
        for finish in ends:
            try:
                finish()
            except Exception as error:
                logger.error("the end of the record was lost: %s", error)

    def _write(self, watched: WatchedStep, batch: Any) -> None:
        found = watched.findings(self._failure)
        allocated, peak = self._memory()
        row = StepRecord(
            step=self._step,
            attempt=self._run.attempt,
            loss=found.loss,
            lr=found.lr,
            grad_norm=found.grad_norm,
            scale=found.scale,
            applied=found.applied,
            samples_per_second=num_samples(batch) / found.seconds,
            memory_allocated_bytes=allocated,
            memory_peak_bytes=peak,
        )
        self._run.append_steps([row])
        self._applied += found.applied
        self._loss = found.loss
        self._write_events(found)
        self._run.append_layers(found.layers)
        if found.observed is not None:
            self._run.write_observed(found.observed)
        self._table = found.layers or self._table
        if not found.is_finite or found.origin is not None:
            self._keep_flight(found, row, batch)

    def _write_events(self, found: StepFindings) -> None:
        numbers = {"loss", "scale", "norm", "limit"}
        pattern = [event.model_dump(exclude=numbers) for event in found.events]
        if pattern != self._pattern and self._event_rows < MAX_EVENT_ROWS:
            self._run.append_events(
                LoopRecord(
                    step=self._step,
                    attempt=self._run.attempt,
                    events=tuple(found.events),
                    left_out=found.left_out,
                )
            )
            self._event_rows += 1
        self._pattern = pattern

    def _keep_flight(self, found: StepFindings, row: StepRecord, batch: Any) -> None:
        tensors = named_tensors(batch)
        about = FlightRecord.of(
            row,
            batch="stored" if tensors else "no tensors were given to `step`",
            origin=found.origin,
            no_origin=found.no_origin,
        )
        keep_flight(self._run, about, tensors, found.random_state, self._table)
        if (origin := found.origin) is not None:
            of_weights = origin.operation == "weights"
            if not (of_weights and self._told_weights):  # they stay so
                logger.warning("step %d: %s", self._step, _in_words(origin))
            self._told_weights |= of_weights

    def _wants_origin(self, is_loss_finite: bool) -> bool:
        self._searches[is_loss_finite] += 1
        return self._searches[is_loss_finite] <= MAX_SEARCHES

    def _memory(self) -> tuple[int, int]:
        """Bytes allocated now and at the peak: of the GPU, or the peak of this process on a CPU."""
        device = self._watched.device
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
        return peak, peak


def _refuse_what_cannot_be_recorded(model: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        what = f"Recorder takes a torch.nn.Module, not a {type(model).__name__}"
        raise user_error(what, "give it the model that the loop calls")
    if not isinstance(optimizer, torch.optim.Optimizer):
        what = f"Recorder takes a torch.optim.Optimizer, not a {type(optimizer).__name__}"
        raise user_error(what, "derive the optimizer from `torch.optim.Optimizer`")
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        what = f"the model's parameter {lazy[0]} has no shape yet"
        raise user_error(what, "call the model once before the recorder is made")


def _new_run(about: ForeignRun, out: Path) -> RunDirectory:
    try:
        return RunDirectory.create_foreign(about, environment(), out)
    except UserError as error:  # in the words of the command line
        what = str(error).replace("--output ", "out=")
        hint = "name a new folder that can be written, such as one with the time in its name"
        raise user_error(what, hint, exit_code=error.exit_code) from error


def _in_words(origin: NonFiniteOrigin) -> str:
    if origin.phase == "input":
        return f"the model was given a batch that holds {origin.value}"
    if origin.operation == "weights":
        where = f"`{origin.module}`" if origin.module else "the model itself"
        return f"the weights of {where} are not finite before it: they hold {origin.value}"
    where = f"`{origin.module}`" if origin.module else "the model's own operations"
    return f"the first {origin.value} was made by {where}, in {origin.phase}"
