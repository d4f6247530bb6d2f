"""The flight recorder: what is needed to look again at a step that went wrong.

flights/step-<N>/
    flight.json             loss, norm and scale of the step
    batch.safetensors       its global batch (`batch.*`) and the random state before it (`rng.*`)
    layers.jsonl            rows of the last step that was sampled before it

The first steps of a run that went wrong are kept, and the newest ones: a fixed number, each of
bounded size, however long the run is.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from mpcli.recipe.errors import Exit, user_error
from mpcli.records import FlightRecord, LayerRecord
from mpcli.rundir import RunDirectory

FIRST, NEWEST = 4, 4
"""Flights that are kept: of the beginning, and of the end so far."""
MAX_BATCH_BYTES = 2**25
"""A larger batch is not stored. A run of ours can make it again, from its seed and the step."""

_LONGEST_RECORD = 2**22
_RECORD, _BATCH, _LAYERS = "flight.json", "batch.safetensors", "layers.jsonl"


def keep_flight(
    run: RunDirectory,
    about: FlightRecord,
    batch: Mapping[str, Tensor],
    random_state: Mapping[str, Tensor],
    table: Sequence[LayerRecord],
) -> None:
    """Keep a step in the run directory, in rank 0; a disk that is full ends no run.

    Args:
        about: `batch` in it is filled in here, unless it says why there is none; `largest` always.
        batch: the global batch, on any device.
        random_state: before the step's forward, by device: `cpu`, `cuda`.
        table: the rows of the last sampled step.
    """
    if run.rank:
        return
    size = sum(tensor.nbytes for tensor in batch.values())
    fits = size <= MAX_BATCH_BYTES
    if about.batch == "stored" and not fits:
        about = about.model_copy(update={"batch": f"not stored: {size:,} bytes"})
    largest = {name: finite_max(t) for name, t in batch.items() if t.is_floating_point()}
    about = about.model_copy(update={"largest": largest})
    named = {f"batch.{name}": tensor for name, tensor in batch.items() if fits}
    named |= {f"rng.{name}": tensor for name, tensor in random_state.items()}
    # A tensor may share its memory with another one, which safetensors refuses.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    folder = run.flights_path / f"step-{about.step}"
    temporary = folder.with_suffix(".tmp")
    with run.recording():
        run.check_reserve()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            (temporary / _RECORD).write_text(about.to_json(indent=2) + "\n", "utf-8")
            (temporary / _BATCH).write_bytes(safetensors.torch.save(tensors))
            rows = "".join(f"{row.to_json()}\n" for row in table)
            (temporary / _LAYERS).write_text(rows, "utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # of what did not fit
        for step in sorted(_steps(run.flights_path))[FIRST:-NEWEST]:
            shutil.rmtree(run.flights_path / f"step-{step}")


def finite_max(tensor: Tensor) -> float:
    """Largest finite magnitude in a tensor; 0 in an empty one."""
    values = tensor.detach().abs().nan_to_num(0.0, posinf=0.0)
    return float(values.max()) if values.numel() else 0.0


def flights(run: RunDirectory) -> list[FlightRecord]:
    """The steps that were kept, in order; those that cannot be read are left out."""
    found = []
    for step in sorted(_steps(run.flights_path)):
        path = run.flights_path / f"step-{step}" / _RECORD
        with contextlib.suppress(OSError, ValidationError):
            if path.is_file() and path.stat().st_size <= _LONGEST_RECORD:  # no pipe
                found.append(FlightRecord.model_validate_json(path.read_bytes()))
    return found


def load_flight(run: RunDirectory, step: int) -> dict[str, Tensor]:
    """The tensors of a flight on the CPU: `batch.*` and `rng.*`.

    Raises:
        UserError: exit 4, they cannot be read.
    """
    path = run.flights_path / f"step-{step}" / _BATCH
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        what = f"flights/{path.parent.name}/{_BATCH} cannot be read: {error}"
        raise user_error(what, exit_code=Exit.CHECKPOINT) from error


def forget_flights(run: RunDirectory, after: int) -> None:
    """Remove those of later steps than `after`, which will be made again; in rank 0."""
    if run.rank:
        return
    with run.recording():
        for step in _steps(run.flights_path):
            if step > after:
                shutil.rmtree(run.flights_path / f"step-{step}")


def _steps(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = (re.fullmatch(r"step-([1-9][0-9]{0,17})", name) for name in names)
    return [int(match[1]) for match in matches if match]
