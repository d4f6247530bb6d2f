"""A small checkpoint, and a child process to break it in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcli.checkpoint import Checkpoint, save
from mpcli.checkpoint.layout import MANIFEST, STATE, TENSORS, FileEntry, Manifest, encode, sha256

FILES = (TENSORS, STATE, MANIFEST)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """A few tensors of the types that a run has."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=generator)
    return {
        "model.weight": weight,
        "model.half": weight.half(),
        "model.bf16": weight.bfloat16(),
        "optimizer.step": torch.tensor(float(seed)),
        "rng": torch.arange(16, dtype=torch.uint8),
        "found_inf": torch.tensor(True),
        "none": torch.empty(0, 3),
    }


def small(folder: Path, step: int = 5, keep_last: int = 2, **state: Any) -> Checkpoint:
    """Save a checkpoint whose content is that of its step."""
    return save(folder, step, tensors(step), {"applied": step, **state}, keep_last=keep_last)


def reseal(checkpoint: Path, **changed: Any) -> None:
    """Make a manifest fit what the files hold now, as somebody who wants to deceive would."""
    step = int(checkpoint.name.removeprefix("step-"))
    files = {
        name: FileEntry(size=(checkpoint / name).stat().st_size, sha256=sha256(checkpoint / name))
        for name in (TENSORS, STATE)
    }
    manifest = Manifest(version=1, step=step, files=files).model_dump() | changed
    (checkpoint / MANIFEST).write_bytes(encode(manifest))


def in_child(function: Callable[[], object]) -> int:
    """Run in a forked process; its exit status: what it left with, 0, or 70 for an exception."""
    child = os.fork()
    if not child:
        status = 70
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
