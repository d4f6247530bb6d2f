"""Loops as people write them, each a few steps of a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_  # by name, as people import them

Batch = tuple[Tensor, Tensor]
Step = Callable[[Any], AbstractContextManager[None]]
Record = Callable[..., Step]
"""Called with model, optimizer and scaler, as `Recorder` is; returns `recorder.step`."""


def unrecorded(*_: object) -> Step:
    return lambda batch: nullcontext()


def batches(steps: int = 4, size: int = 6) -> Iterator[Batch]:
    """Images [size, 1, 6, 6] and labels, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(size, 1, 6, 6, generator=generator)
        yield images, torch.randint(3, (size,), generator=generator)


def conv_net() -> nn.Module:
    """With what a copy or a hook could get wrong: buffers, operations in place, random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 3),
    )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def fp32(model: nn.Module, record: Record) -> None:
    optimizer = adam(model)
    step = record(model, optimizer)
    for batch in batches():
        with step(batch):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()


def bf16(model: nn.Module, record: Record) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step = record(model, optimizer)
    for batch in batches():
        with step(batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            schedule.step()


def fp16(model: nn.Module, record: Record, *, fused: bool = False) -> None:
    """The scale is too high at first: steps are skipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-7)
    step = record(model, optimizer, scaler)
    for batch in batches():
        with step(batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            if not fused:
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()


def fused(model: nn.Module, record: Record) -> None:
    """An optimizer that unscales, and leaves a step out, by itself."""
    fp16(model, record, fused=True)


def accumulated(model: nn.Module, record: Record) -> None:
    optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = record(model, optimizer, scaler)
    for images, labels in batches():
        with step((images, labels)):
            for part in range(3):
                micro = images[part * 2 : part * 2 + 2], labels[part * 2 : part * 2 + 2]
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = loss_of(model, micro) / 3
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none=False)


def masters(model: nn.Module, record: Record) -> None:
    """Half weights, and fp32 copies of them that the optimizer steps, by hand."""
    model.to(torch.bfloat16)
    copies = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(copies, lr=0.01)
    step = record(model, optimizer)
    for images, labels in batches():
        with step((images, labels)):
            (loss_of(model, (images.bfloat16(), labels)) * 1024).backward()
            for parameter, master in zip(model.parameters(), copies, strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float() / 1024
            optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(model.parameters(), copies, strict=True):
                    parameter.copy_(master)
            model.zero_grad()


LOOPS = {loop.__name__: loop for loop in (fp32, bf16, fp16, fused, accumulated, masters)}
