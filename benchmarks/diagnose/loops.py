"""Training loops as people write them by hand, each with a mistake and without it.

A loop trains `case.model` on `case.batches` inside of `case.step(batch)`, which records. Where
`case.corrected` it is what the loop should have been. Nothing else tells it apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.diagnose import task
from benchmarks.diagnose.runs import Trained
from mpcli import Recorder
from mpcli.precision.cpu_autocast import cuda_autocast_policy

STEPS, BATCH, LR = 60, 16, 0.05


@dataclass
class Case:
    """What a loop trains, how it is recorded, and its schedule: the rate falls to zero."""

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    corrected: bool
    out: Path
    steps: int = 0
    optimizer: torch.optim.Optimizer | None = None
    recorder: Recorder | None = None

    def record(self, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
        """Begin to record."""
        self.optimizer = optimizer
        self.recorder = Recorder(self.model, optimizer, scaler, out=self.out, every=10)

    def step(self, batch: Any) -> AbstractContextManager[None]:
        """Around one step."""
        assert self.optimizer
        assert self.recorder
        for group in self.optimizer.param_groups:
            group["lr"] = LR * (1 - self.steps / STEPS)
        self.steps += 1
        return self.recorder.step(batch)


Loop = Callable[[Case], None]


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.float16)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, **options)


def wrong_device(case: Case) -> None:
    """`autocast("cuda")` on a machine where the model is on the CPU."""
    optimizer, scaler = sgd(case.model), torch.amp.GradScaler("cpu")
    case.record(optimizer, scaler)
    for images, labels in case.batches:
        with case.step(images):
            optimizer.zero_grad()
            with torch.autocast("cpu" if case.corrected else "cuda", dtype=torch.float16):
                loss = F.cross_entropy(case.model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def outside_of_autocast(case: Case) -> None:
    """The forward runs before the block that was meant for it."""
    optimizer, scaler = sgd(case.model), torch.amp.GradScaler("cpu")
    case.record(optimizer, scaler)
    for images, labels in case.batches:
        with case.step(images):
            optimizer.zero_grad()
            if case.corrected:
                with half():
                    logits = case.model(images)
            else:
                logits = case.model(images)
            with half():
                loss = F.cross_entropy(logits.float(), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def clip_first(case: Case) -> None:
    """Clips gradients that still have the scale."""
    optimizer, scaler = sgd(case.model), torch.amp.GradScaler("cpu")
    case.record(optimizer, scaler)
    for images, labels in case.batches:
        with case.step(images):
            optimizer.zero_grad()
            with half():
                loss = F.cross_entropy(case.model(images).float(), labels)
            scaler.scale(loss).backward()
            if case.corrected:
                scaler.unscale_(optimizer)
            clip_grad_norm_(case.model.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()


def plain_step(case: Case) -> None:
    """Scales the loss, and steps the optimizer as ever."""
    optimizer, scaler = sgd(case.model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    case.record(optimizer, scaler)
    for images, labels in case.batches:
        with case.step(images):
            optimizer.zero_grad()
            with half():
                loss = F.cross_entropy(case.model(images).float(), labels)
            scaler.scale(loss).backward()
            if case.corrected:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()


def step_in_window(case: Case) -> None:
    """Every micro-batch updates, with the gradients of those before it.

    (Harmless with a scaler: its step divides what was added up by the scale, every time.)
    """
    optimizer = sgd(case.model)
    case.record(optimizer)
    for images, labels in case.batches:
        with case.step(images):
            optimizer.zero_grad()
            for part, targets in zip(images.split(2), labels.split(2), strict=True):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(case.model(part).float(), targets) / 8
                loss.backward()
                if not case.corrected:
                    optimizer.step()
            if case.corrected:
                optimizer.step()


def never_zeroed(case: Case) -> None:
    """Gradients of all steps add up. (Harmless with a scaler too.)"""
    optimizer = sgd(case.model)
    case.record(optimizer)
    for images, labels in case.batches:
        with case.step(images):
            for part, targets in zip(images.split(8), labels.split(8), strict=True):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(case.model(part).float(), targets) / 2
                loss.backward()
            optimizer.step()
            if case.corrected:
                optimizer.zero_grad()


def fused_first_skip(case: Case) -> None:
    """A scale that is too high at first, and torch's fused SGD with momentum."""
    optimizer = sgd(case.model, fused=not case.corrected)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32, backoff_factor=2.0**-8)
    case.record(optimizer, scaler)
    for images, labels in case.batches:
        with case.step(images):
            optimizer.zero_grad()
            with half():
                loss = F.cross_entropy(case.model(images).float(), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


class Momentum(torch.optim.Optimizer):
    """Heavy ball by hand; `skip` leaves out the update of weights, and `whole` all of the step."""

    def __init__(self, parameters: Any, lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.skip = self.whole = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or (self.skip and self.whole):
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
                if not self.skip:
                    parameter.sub_(state["momentum_buffer"], alpha=group["lr"])


def moment_before_check(case: Case) -> None:
    """A scale by hand; a step that is skipped has already changed the momentum."""
    optimizer = Momentum(case.model.parameters(), lr=LR, momentum=0.9)
    optimizer.whole = case.corrected
    scale = 2.0**32
    case.record(optimizer)
    for images, labels in case.batches:
        with case.step(images):
            optimizer.zero_grad()
            with half():
                loss = F.cross_entropy(case.model(images).float(), labels)
            (loss * scale).backward()
            gradients = [p.grad for p in case.model.parameters() if p.grad is not None]
            optimizer.skip = not all(bool(gradient.isfinite().all()) for gradient in gradients)
            for gradient in gradients:
                gradient.div_(scale)
            optimizer.step()
            if optimizer.skip:
                scale /= 256


def damaged_batch_in_bf16(case: Case) -> None:
    """One batch holds NaN, and nothing skips its step."""
    optimizer = sgd(case.model)
    case.record(optimizer)
    for number, (images, labels) in enumerate(case.batches):
        if number == STEPS // 2:
            images[0, 0, 3, 3] = math.nan
        if case.corrected and not images.isfinite().all():
            continue
        with case.step(images):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(case.model(images).float(), labels)
            loss.backward()
            optimizer.step()


def plain_fp32(case: Case) -> None:
    """No mistake: for false alarms."""
    optimizer = sgd(case.model)
    case.record(optimizer)
    for images, labels in case.batches:
        with case.step(images):
            optimizer.zero_grad()
            F.cross_entropy(case.model(images), labels).backward()
            optimizer.step()


LOOPS: dict[str, Loop] = {
    loop.__name__: loop
    for loop in (
        wrong_device, outside_of_autocast, clip_first, plain_step, step_in_window, never_zeroed,
        fused_first_skip, moment_before_check, damaged_batch_in_bf16, plain_fp32,
    )
}  # fmt: skip


def run_loop(loop: str, options: task.Options, seed: int, out: Path, *, corrected: bool) -> Trained:
    """Run a loop on a model of the benchmark; `out` becomes a recorded run."""
    torch.manual_seed(seed)
    data = task.load_data(options, None)
    data.prepare(torch.device("cpu"))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(STEPS):
            batch = data.train_batch(seed, number, BATCH)
            yield batch["inputs"], batch["targets"]

    case = Case(task.build_model(options, None), batches(), corrected, out)
    with cuda_autocast_policy():
        LOOPS[loop](case)
    assert case.recorder
    case.recorder.close()
    rows = [row for row in (out / "steps.jsonl").read_text("utf-8").splitlines() if row]
    skipped = sum('"applied": false' in row for row in rows) / max(len(rows), 1)
    case.model.eval()
    with torch.no_grad():
        loss = task.evaluate(options, case.model, data.eval_batches(360))["loss"]
    return Trained(loss if math.isfinite(loss) else math.inf, skipped, "done")
