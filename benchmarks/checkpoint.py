"""How long a save holds training up, beside `torch.save` of the same state.

The state is that of Adam on an MLP: weights and two moments, all fp32. Both sides end with the
data on the disk: `torch.save` gets the fsync that it does not make itself. What ours does besides
is to hash every byte, write the manifest and sync the folders.

    python benchmarks/checkpoint.py --folder DIR_ON_THE_DISK_TO_MEASURE
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mpcli.checkpoint import Checkpoint, load, save


def adam_state(megabytes: int) -> dict[str, Tensor]:
    """Weights and moments of layers of 1 MB each."""
    layers = max(1, megabytes // 3)
    return {
        f"{kind}.{layer}.weight": torch.randn(512, 512)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for layer in range(layers)
    }


def by_torch(folder: Path, step: int, state: dict[str, Tensor], *, sync: bool) -> None:
    """`torch.save`, replacing the file before."""
    path = folder / "checkpoint.pt"
    with path.with_suffix(".tmp").open("wb") as file:
        torch.save({"state": state, "step": step}, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def ours(folder: Path, step: int, state: dict[str, Tensor]) -> None:
    """A checkpoint of ours, of which one stays."""
    save(folder, step, state, {"step": step}, keep_last=1)


def settle(folder: Path) -> None:
    """Bring to the disk whatever is in the folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def measure(megabytes: int, repeats: int, root: Path) -> list[list[float]]:
    """Milliseconds of each save of each kind, and of each load."""
    state = adam_state(megabytes)
    sides: list[Callable[[int], object]] = [
        lambda step: by_torch(root, step, state, sync=False),
        lambda step: by_torch(root, step, state, sync=True),
        lambda step: ours(root / "checkpoints", step, state),
        lambda step: load(Checkpoint(root / "checkpoints" / f"step-{step}", step)),
    ]
    times: list[list[float]] = [[] for _ in sides]
    for step in range(repeats + 1):
        for side, taken in zip(sides, times, strict=True):
            started = time.perf_counter()
            side(step)
            taken.append((time.perf_counter() - started) * 1e3)
            settle(root)  # nobody pays for what another left to be written
    return [taken[1:] for taken in times]  # the first one warms up


def main() -> None:
    """Print a row per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[3, 30, 300])
    parser.add_argument("--repeats", type=int, default=7, help="saves of each kind, interleaved")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    arguments = parser.parse_args()
    print("milliseconds; median of interleaved saves (fastest to slowest)")
    print(f"{'state':>8} {'torch.save':>24} {'torch.save, fsync':>24} {'ours':>24} {'load':>24}")
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            times = measure(megabytes, arguments.repeats, Path(folder))
        columns = [
            f"{statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f})"
            for taken in times
        ]
        print(f"{megabytes:5} MB {' '.join(f'{column:>24}' for column in columns)}", flush=True)


if __name__ == "__main__":
    main()
