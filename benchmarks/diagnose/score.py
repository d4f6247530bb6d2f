"""One cell: train it, ask `mptrain diagnose`, follow its suggestion, and count what is right."""

from __future__ import annotations

import json
import math
import re
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.diagnose.faults import FP32, Cell
from benchmarks.diagnose.loops import LOOPS, run_loop
from benchmarks.diagnose.runs import Trained, diagnosis, train, train_recipe
from benchmarks.diagnose.task import Family, Options
from mpcli.recipe.errors import UserError

HEALTHY = 5
"""Seeds of a control; the spread of healthy losses is their mean and three standard deviations."""
SUGGESTIONS = 3
"""Tried at most, the first one first."""
Score = dict[str, Any]


def control(cell: Cell, seed: int) -> Score:
    """Losses of the training without the fault, of some seeds, and its bytes of activations."""
    losses, size = [], 0
    for number in range(HEALTHY if cell.harm == "loss" else 1):
        with tempfile.TemporaryDirectory() as folder:
            trained = _trained(cell, cell.control, seed + number, Path(folder), corrected=True)
            losses.append(trained.loss)
            size = _activations(Path(folder, "run"))
    return {"losses": losses, "activations": size}


def control_name(cell: Cell) -> str:
    """Cells with the same training share a control."""
    if cell.damage or cell.loop:
        return f"{cell.name} {cell.loop}"
    return f"{cell.family} {cell.harm} {' '.join(cell.control)}"


def examine(cell: Cell, healthy: Score, seed: int, *, diagnose: bool = True) -> Score:
    """What a cell gives: `state` (scored, harmless or failed), and its score.

    Args:
        healthy: its `control`.
        diagnose: not only whether the fault is real.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _examined(cell, healthy, seed, Path(folder), diagnose)
    except Exception:  # it counts as a cell in which nothing is right, and the rest goes on
        return {"state": "failed", "why": traceback.format_exc(limit=-3)}


def false_alarms(family: Family, overrides: Sequence[str], seed: int) -> Score:
    """What is said of a healthy run of ours, of level warning or above."""
    with tempfile.TemporaryDirectory() as folder:
        trained = train(family, overrides, seed, Path(folder))
        said = diagnosis(Path(folder, "run"), of_plugin=True)
    return {"loss": trained.loss, "alarms": alarms(said)}


def loop_alarms(loop: str, family: Family, seed: int) -> Score:
    """What is said of a healthy run of somebody's loop, of level warning or above."""
    options = Options(kind="plugin", model=family)
    with tempfile.TemporaryDirectory() as folder:
        trained = run_loop(loop, options, seed, Path(folder, "run"), corrected=True)
        said = diagnosis(Path(folder, "run"), of_plugin=False)
    return {"loss": trained.loss, "alarms": alarms(said)}


def alarms(said: dict[str, Any]) -> list[str]:
    """Ids and causes of what is no mere information."""
    found = [finding for finding in said["findings"] if finding["severity"] != "info"]
    return [f"{finding['id']}: {finding['cause']}" for finding in found]


def bound(healthy: Score) -> float:
    """The largest loss of a healthy training."""
    losses = healthy["losses"]
    return mean(losses) + 3 * stdev(losses) if len(losses) > 1 else losses[0]


def _examined(cell: Cell, healthy: Score, seed: int, folder: Path, diagnose: bool) -> Score:
    trained = _trained(cell, cell.faulty, seed, folder / "faulty")
    about = {
        "loss": trained.loss,
        "skipped": trained.skipped,
        "healthy": bound(healthy),
        "activations": [_activations(folder / "faulty" / "run"), healthy["activations"]],
    }
    if _is_healthy(cell, trained, healthy, seed, cell.faulty, folder / "faulty"):
        return {"state": "harmless", **about}
    if not diagnose:
        return {"state": "scored", **about}
    said = diagnosis(folder / "faulty" / "run", of_plugin=cell.loop is None)
    first = next(iter(said["findings"]), None)
    ids = [finding["id"] for finding in said["findings"]]
    score: Score = {
        "state": "scored",
        **about,
        "found": ids,
        "class": bool(ids) and ids[0] == cell.fault,
        "phase": bool(first) and first["phase"] in cell.phases,
        "first": first,
    }
    if cell.layers:
        score["layer"] = bool(first) and next(iter(first["layers"]), None) in cell.layers
    if first:
        score |= _patched(cell, first, healthy, seed, folder)
    return score | {"patch": score.get("patch", 0)}


def _patched(cell: Cell, finding: dict[str, Any], healthy: Score, seed: int, folder: Path) -> Score:
    """Which suggestion mends the training in full, from 1; 0: none does. And what came of each."""
    suggested = [finding["suggestion"], *finding["alternatives"]]
    tried: list[Score] = []
    for number, suggestion in enumerate(filter(None, suggested[:SUGGESTIONS]), start=1):
        at = folder / f"patched-{number}"
        changed, settings = suggestion["set"], repair_of(cell, suggestion)
        if (cell.loop and changed) or (not changed and settings is None):
            tried.append({"what": suggestion["what"], "why": "nothing that could be tried"})
            continue
        try:
            if changed:
                recipe = folder / "faulty" / "run" / "recipe.yaml"
                trained = train_recipe(recipe, changed, at)
            else:
                trained = _trained(cell, settings or (), seed, at, corrected=True)
        except UserError as error:
            tried.append({"what": suggestion["what"], "why": str(error)})
            continue
        tried.append({"what": suggestion["what"], "loss": trained.loss})
        if _is_healthy(cell, trained, healthy, seed, settings or (), at):
            return {"patch": number, "tried": tried}
    return {"patch": 0, "tried": tried}


def repair_of(cell: Cell, suggestion: dict[str, Any]) -> tuple[str, ...] | None:
    """What stands for a suggested change of code; None: it says nothing that could be tried."""
    if not cell.repair:
        return None
    words, settings = cell.repair
    said = f"{suggestion['what']} {suggestion['code'] or ''} {suggestion['arguments']}"
    return settings if re.search(words, said, re.IGNORECASE) else None


def _is_healthy(
    cell: Cell, trained: Trained, healthy: Score, seed: int, settings: Sequence[str], at: Path
) -> bool:
    """Whether a training is no different from its control, in what the fault changes."""
    match cell.harm:
        case "loss":
            return trained.loss <= bound(healthy)
        case "memory":  # and it learns
            return _activations(at / "run") <= 1.05 * healthy["activations"]
        case "repeat":
            with tempfile.TemporaryDirectory() as folder:
                again = _trained(cell, settings, seed, Path(folder))
            return again.loss == trained.loss and math.isfinite(trained.loss)


def _trained(
    cell: Cell, settings: Sequence[str], seed: int, folder: Path, *, corrected: bool = False
) -> Trained:
    """A cell's training; its run is `folder`/run. `corrected`: of a loop, and of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if cell.loop:
        options = Options(kind="plugin", model=cell.family)
        return run_loop(cell.loop, options, seed, folder / "run", corrected=corrected)
    if cell.damage:
        weights = _weights(cell, seed, folder, good=corrected)
        settings = (*settings, f"task.weights={weights}", "optim.lr=1e-3")
    return train(cell.family, settings, seed, folder)


def _weights(cell: Cell, seed: int, folder: Path, *, good: bool) -> Path:
    """Weights that were trained for a while, and spoilt if they are not to be good."""
    assert cell.damage
    train(cell.family, (FP32,), seed + 1000, folder / "before")
    tensors = load_file(folder / "before" / "run" / "final" / "model.safetensors")
    with torch.no_grad():
        if not good:
            cell.damage.spoil(tensors[cell.damage.tensor])
    save_file(tensors, path := folder / "weights.safetensors")
    return path


def _activations(run: Path) -> int:
    """Bytes of all modules' outputs in the first step, in the types that they computed in.

    The types are those of a product's operands, where a module has any: what an fp32 island gives
    back is half precision again.
    """
    rows, types = run / "layers.jsonl", run / "attempts" / "1" / "observed.json"
    if not (rows.is_file() and types.is_file()):
        return 0
    computed = json.loads(types.read_text("utf-8"))
    total = 0
    for line in rows.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["step"] == 1 and row["tensor"] == "output":
            seen = computed.get(row["module"], {"outputs": row["dtype"]})
            dtype = seen["outputs"] if seen.get("operands", "-") == "-" else seen["operands"]
            total += row["elements"] * (4 if "fp32" in dtype else 2)
    return total


HEALTHY_LOOPS = tuple(LOOPS)
