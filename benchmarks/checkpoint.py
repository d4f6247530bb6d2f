"""How long a save holds training up, beside `torch.save` and torch's own checkpoint writer.

The state is that of Adam on an MLP: weights and two moments, all fp32. Everybody ends with the
data on the disk: `torch.save` gets the fsync that it does not make itself. What ours does besides
is to hash every byte, write the manifest and sync the folders. In the background
(`output.async_checkpoint`) only a copy in memory holds the training up; its time is that until
the training goes on, the writing is waited for outside it. DCP is
`torch.distributed.checkpoint.save` with its HuggingFaceStorageWriter, the writer for many
processes, whose layout ours has.

    make bench-checkpoint
    python benchmarks/checkpoint.py --folder DIR_ON_THE_DISK_TO_MEASURE
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mpcli.checkpoint import Checkpoint, Saver, load, save


def adam_state(megabytes: int) -> dict[str, Tensor]:
    """Weights and moments of layers of 1 MB each."""
    layers = max(1, megabytes // 3)
    return {
        f"{kind}.{layer}.weight": torch.randn(512, 512)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for layer in range(layers)
    }


def by_torch(folder: Path, step: int, state: dict[str, Tensor]) -> None:
    """`torch.save` to the disk, replacing the file before."""
    path = folder / "checkpoint.pt"
    with path.with_suffix(".tmp").open("wb") as file:
        torch.save({"state": state, "step": step}, file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def by_dcp(folder: Path, step: int, state: dict[str, Tensor]) -> None:
    """torch's distributed writer of safetensors, in one process."""
    shutil.rmtree(folder / "dcp", ignore_errors=True)
    writer = dcp.HuggingFaceStorageWriter(str(folder / "dcp"), save_distributed=True)
    dcp.save(state, storage_writer=writer, no_dist=True)
    settle(folder / "dcp")


def settle(folder: Path) -> None:
    """Bring to the disk whatever is in the folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def measure(megabytes: int, repeats: int, root: Path) -> list[list[float]]:
    """Milliseconds of each save of each kind, and of each load."""
    state = adam_state(megabytes)
    ours, beside = root / "ours", root / "beside"
    saver = Saver(beside, 1, state, background=True)
    sides: list[Callable[[int], object]] = [
        lambda step: by_torch(root, step, state),
        lambda step: by_dcp(root, step, state),
        lambda step: save(ours, step, state, {"step": step}, keep_last=1),
        lambda step: saver.save(step, state, {"step": step}),
        lambda step: load(Checkpoint(ours / f"step-{step}", step)),
    ]
    times: list[list[float]] = [[] for _ in sides]
    for step in range(repeats + 1):
        for side, taken in zip(sides, times, strict=True):
            started = time.perf_counter()
            side(step)
            taken.append((time.perf_counter() - started) * 1e3)
            saver.finished(wait=True)
            settle(root)  # nobody pays for what another left to be written
    return [taken[1:] for taken in times]  # the first one warms up


def main() -> None:
    """Print a row per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[3, 30, 300])
    parser.add_argument("--repeats", type=int, default=7, help="saves of each kind, interleaved")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    columns = ("torch.save", "DCP", "ours", "ours, async", "share", "load")
    print("milliseconds; median of interleaved saves (fastest to slowest)")
    print("| state | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            times = measure(megabytes, arguments.repeats, Path(folder))
        medians = [statistics.median(taken) for taken in times]
        cells = [
            f"{median:.1f} ({min(taken):.1f} to {max(taken):.1f})"
            for median, taken in zip(medians, times, strict=True)
        ]
        cells.insert(4, f"{medians[3] / medians[2]:.1%}")
        print(f"| {megabytes} MB | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
