"""A run's model, data and engine, brought to where a step of it began."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mpcli import checkpoint
from mpcli.checkpoint import Checkpoint
from mpcli.data.batch import Batch
from mpcli.engines.base import Outcome
from mpcli.engines.local import LocalEngine
from mpcli.flight import flights, load_flight
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recipe.recipe import Recipe
from mpcli.records import Plan, TrainingState
from mpcli.rundir import RunDirectory
from mpcli.tasks import apply_activation_checkpointing, task_of

TELL_EVERY = 10.0  # seconds


class Start(NamedTuple):
    """A state to go on from: that of a checkpoint (None: fresh weights), after so many steps."""

    attempted: int
    checkpoint: Checkpoint | None


class Stage:
    """What a run trains with, made as the trainer makes it; `trainer.settings` surround it.

    Attributes:
        model: which the engine has converted.
        exact: another one in fp32, built like it; `give_exact_weights` gives it the weights.
    """

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        self.recipe, self.plan = recipe, plan
        self.device = torch.device(plan.device)
        self.task = task_of(recipe.task)
        self.data = self.task.load_data(recipe.task, recipe.data)
        self.data.prepare(self.device)

        self.model = self._build_model()
        names = {name for name, _ in self.model.named_modules()}
        if unknown := sorted(set(plan.fp32_modules) - names):
            raise _broken(f"the plan of the run has a module `{unknown[0]:.100}`, its model not")
        self.engine = LocalEngine(recipe, self.model, self.device, plan.steps, plan.fp32_modules)
        self.loss = functools.partial(self.task.loss, recipe.task)

    @functools.cached_property
    def exact(self) -> nn.Module:
        """Not a copy: what a model holds besides parameters need not bear one."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return self._build_model()

    def _build_model(self) -> nn.Module:
        """As the run began with."""
        torch.manual_seed(self.recipe.train.seed)
        model = self.task.build_model(self.recipe.task, self.data.info).to(self.device)
        if self.recipe.engine.activation_checkpointing:
            apply_activation_checkpointing(model)
        return model

    def batch(self, step: int) -> Batch:
        """The global batch of an attempted step, from 1."""
        train = self.recipe.train
        return self.data.train_batch(train.seed, step - 1, train.global_batch_size)

    def restore_flight(
        self, run: RunDirectory, step: int, batch: Batch
    ) -> tuple[Batch, tuple[str, ...] | None]:
        """What the run kept of the step that is to come, where it kept it (`mpcli.flight`).

        Its batch and random state are the run's own: they go before those of the data set, which
        may have changed since, and of the steps that were run again. Torch's random state becomes
        the one that was kept.

        Args:
            batch: of the data set.

        Returns:
            the batch, and which of `batch` and `random state` were others; None without a flight.

        Raises:
            UserError: exit 4, what was kept cannot be read, or is not of this run.
        """
        kept = [
            about for about in flights(run) if (about.step, about.attempt) == (step, run.attempt)
        ]
        if not kept:
            return batch, None
        tensors = load_flight(run, step)
        own, device = batch.tensors, next(iter(batch.tensors.values())).device
        stored = {name: t.to(device) for name, t in _part(tensors, "batch.").items()}
        random = _part(tensors, "rng.")
        differing = []
        if stored and not _is_same(stored, own):
            if not _is_like(stored, own, kept[0].weights):
                raise _broken(f"the batch of step {step:,} in `flights` is not of this run")
            batch = Batch(stored, kept[0].weights)
            differing.append("batch")
        if random and not _is_same(random, self.engine.random_state()):
            try:
                torch.set_rng_state(random["cpu"])
                if self.device.type == "cuda" and "cuda" in random:
                    torch.cuda.set_rng_state(random["cuda"], self.device)
            except (KeyError, RuntimeError, TypeError) as error:
                what = f"the random state of step {step:,} in `flights` is none"
                raise _broken(what) from error
            differing.append("random state")
        return batch, tuple(differing)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """As the run cut them, those of rank 0 first."""
        ranks = range(self.plan.world_size)
        shares = (batch.share(rank, self.plan.world_size) for rank in ranks)
        return [part for share in shares for part in share.split(self.plan.micro_batch_size)]

    def bring_to(
        self, run: RunDirectory, step: int, tell: Callable[[str], None]
    ) -> tuple[Start, int]:
        """Get the state in which an attempted step began.

        From the nearest checkpoint that can be used the steps before it are run again, and go back
        where the run did (`rollbacks.jsonl`).

        Returns:
            the state that was gone on from, and how many steps were run again.

        Raises:
            UserError: exit 4, the run cannot have gone back as it says.
        """
        rows = run.rollbacks()
        backs = {row.step: row.checkpoint for row in rows if row.step < step}
        if not all(0 <= to < end for end, to in backs.items()):
            raise _broken("`rollbacks.jsonl` goes back to a step that was not before it")
        start = next(s for s in _starts(run, step, backs) if self._can_restore(s, tell))
        backs = {end: to for end, to in backs.items() if end > start.attempted}
        seen: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        again = step - 1 - start.attempted
        if again:
            name = start.checkpoint.path.name if start.checkpoint else "the beginning"
            steps = (
                f"step {step - 1:,}" if again == 1 else f"steps {step - again:,} to {step - 1:,}"
            )
            tell(f"running {steps} again, from {name}")
        told = time.monotonic()
        for attempted in range(start.attempted, step):
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                tell(f"{attempted - start.attempted:,} of {again:,} steps are run again")
            if attempted > start.attempted:
                self.run(attempted)
            if attempted in backs:
                tensors, state = seen[backs[attempted]]
                self.engine.restore(tensors, state | {"attempted": attempted})
            if attempted in backs.values():
                tensors, state = self.engine.checkpoint()
                seen[attempted] = {name: t.clone() for name, t in tensors.items()}, state
        return start, again

    def run(self, step: int) -> tuple[Tensor, Outcome]:
        """The attempted step that comes next: its loss, and what became of it."""
        batch = self.batch(step)
        parts = self.micro_batches(batch)
        losses = [
            self.engine.accumulate(self.loss, part, batch.weight, last=number == len(parts))
            for number, part in enumerate(parts, 1)
        ]
        return torch.stack(losses).sum(), self.engine.step()

    def _can_restore(self, start: Start, tell: Callable[[str], None]) -> bool:
        if start.checkpoint is None:
            return True
        try:
            tensors, found = checkpoint.load(start.checkpoint)
            state = TrainingState.model_validate(found)
            self.engine.restore(tensors, state.engine | {"attempted": start.attempted})
        except (UserError, ValidationError) as error:
            why = error.problems[0].what if isinstance(error, UserError) else "no state of a run"
            tell(f"{start.checkpoint.path.name} is passed over: {why}")
            return False
        return True

    @torch.no_grad()
    def give_exact_weights(self) -> None:
        """Bring `exact` to the weights as the run keeps them: its masters, if it has any."""
        weights = self.engine.weights()
        for name, parameter in self.exact.named_parameters():
            parameter.copy_(weights[name])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _is_like(
    one: Mapping[str, Tensor], two: Mapping[str, Tensor], weights: tuple[int, ...] | None
) -> bool:
    """Whether both can be batches of one data set: samples may be as long as they like."""
    numbers = {len(tensor) if tensor.dim() else 0 for tensor in one.values()}
    return (
        {name: (t.dtype, t.dim()) for name, t in one.items()}
        == {name: (t.dtype, t.dim()) for name, t in two.items()}
        and len(numbers) == 1
        and 0 not in numbers
        and (weights is None or ({len(weights)} == numbers and min(weights) >= 0 < sum(weights)))
    )


def _broken(what: str) -> UserError:
    return user_error(what, "restore it from a copy of the run", exit_code=Exit.CHECKPOINT)


def _is_same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == two.keys() and all(
        (one[name].dtype, one[name].shape) == (two[name].dtype, two[name].shape)
        and torch.equal(
            one[name].reshape(-1).view(torch.uint8), two[name].reshape(-1).view(torch.uint8)
        )
        for name in one
    )


def _starts(run: RunDirectory, step: int, backs: dict[int, int]) -> list[Start]:
    """States to begin a step from, the nearest first; the last one always can be.

    Args:
        backs: steps after which the run went back, and the steps of the checkpoints it went to.
    """
    found = {saved.step: saved for saved in checkpoint.completed(run.checkpoints_path)}
    starts = [Start(saved.step, saved) for saved in found.values() if saved.step < step]
    starts += [Start(end, found[to]) for end, to in backs.items() if to in found]
    starts.sort(key=lambda start: start.attempted, reverse=True)
    return [
        start
        for start in [*starts, Start(0, None)]
        # What the run went back to later has to come by.
        if all(to >= start.attempted for end, to in backs.items() if end > start.attempted)
    ]


def check_device(plan: Plan) -> None:
    """Check that the run's device is here.

    Raises:
        UserError: exit 3; 4 for what is no device of a run.
    """
    kind, _, number = plan.device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not re.fullmatch("[0-9]{1,3}", number)):
        raise _broken(f"the plan of the run says device `{plan.device:.50}`, which is none")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        here = torch.cuda.device_count()
        raise user_error(
            f"the run was on {plan.device}, and there is {f'only {here}' if here else 'no'} GPU "
            "here: its steps would be others",
            "copy the run directory to a machine with a GPU",
            exit_code=Exit.ENVIRONMENT,
        )
