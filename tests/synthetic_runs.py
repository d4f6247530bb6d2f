"""Run directories in every state, made without any training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mpcli.recipe.load import load_recipe
from mpcli.records import EvalRecord, ForeignRun, ModulePrecision, Plan, Result, StepRecord
from mpcli.rundir import RunDirectory
from tests.small import RECIPE

NOW = 1_800_000_000.0
"""When they are looked at, in seconds since 1970."""
_CODES = {"done": 0, "diverged": 5, "preempted": 75, "interrupted": 130, "failed": 3}
ENVIRONMENT = {
    "python": "3.11.7",
    "versions": {"torch": "2.14.1", "numpy": "2.4.6"},
    "devices": [{"device": "cpu", "name": "a processor", "threads": 2}],
    "precisions": {"cpu": {"fp16": {"runs": True, "relative_time": 4.2}}},
}


def plan(steps: int = 100, mode: str = "fp16", **changes: Any) -> Plan:
    """The plan of a model of two modules."""
    half = mode.removesuffix("-master").removesuffix("-pure")
    types = {"stored": "fp32", "gradient": "fp32", "master": "-", "why": ""}
    modules = [
        ModulePrecision(name="conv", type="Conv2d", parameters=160, computed=half, **types),
        ModulePrecision(name="norm", type="BatchNorm2d", parameters=8, computed="fp32", **types),
    ]
    values = {
        "device": "cpu", "world_size": 1, "num_train": 1437, "num_eval": 360,
        "data_source": "digits", "sample": {"inputs": "fp32 1x8x8", "targets": "int64"},
        "steps": steps, "steps_per_epoch": 89, "micro_batch_size": 16, "accumulation": 1,
        "parameters": 168, "modules": tuple(modules),
    }  # fmt: skip
    return Plan(**values | changes)


def row(step: int, **changes: Any) -> StepRecord:
    """A step of a loss that falls."""
    values: dict[str, Any] = {
        "step": step, "attempt": 1, "loss": 2.0 * 0.98**step, "lr": 0.1, "grad_norm": 1.0,
        "scale": 65536.0, "applied": True, "samples_per_second": 1000.0,
        "memory_allocated_bytes": 2**20, "memory_peak_bytes": 2**21,
    }  # fmt: skip
    return StepRecord(**values | changes)


def evaluation(step: int, loss: float = 0.5, **metrics: float) -> EvalRecord:
    """After a step."""
    return EvalRecord(step=step, attempt=1, loss=loss, ema=False, seconds=0.5, **metrics)


def begin_run(
    path: Path,
    *overrides: str,
    steps: int = 100,
    environment: Mapping[str, Any] = ENVIRONMENT,
    **planned: Any,
) -> RunDirectory:
    """A run that begins, and holds its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.parent / "recipe.tmp"
    text.write_text(RECIPE)
    settings = [f"train.steps={steps}", *overrides]
    loaded = load_recipe(text, settings)
    text.unlink()
    mode = loaded.recipe.precision.mode
    return RunDirectory.create(loaded, plan(steps, mode, **planned), environment, path)


def end_run(run: RunDirectory, status: str | None = "done", **changes: Any) -> None:
    """Its result, unless it was killed; the lock is free."""
    if status:
        rows = list(run.steps())
        newest = run.last_evaluation()
        train = {"train": {"loss": rows[-1].loss}} if rows else {}
        applied = sum(one.applied for one in rows)
        values: dict[str, Any] = {
            "status": status, "exit_code": _CODES[status], "name": "small",
            "reason": None if status == "done" else f"it {status}",
            "steps_attempted": len(rows), "steps_applied": applied,
            "steps_skipped": len(rows) - applied,
            "metrics": train | ({"eval": newest.metrics} if newest else {}),
            "wall_seconds": 65.0, "peak_memory_bytes": 2**21, "checkpoint": None,
        }  # fmt: skip
        run.write_result(Result(**values | changes))
    run.close()


def make_run(
    path: Path,
    *overrides: str,
    status: str | None = "done",
    done: int = 100,
    steps: int = 100,
    metrics: Mapping[str, float] | None = None,
    skipped: Sequence[int] = (),
    noise: float = 0.0,
    result: Mapping[str, Any] | None = None,
    **about: Any,
) -> Path:
    """A run that is over.

    Args:
        status: of its result; None: killed.
        done: attempted steps.
        noise: that is added to its losses.
    """
    run = begin_run(path, *overrides, steps=steps, **about)
    run.append_steps(
        row(step, loss=2.0 * 0.98**step + noise * math.sin(step), applied=step not in skipped)
        for step in range(1, done + 1)
    )
    if metrics is not None:
        run.append_evaluation(evaluation(done, **metrics))
    end_run(run, status, **result or {})
    return path


def begin_recording(path: Path) -> RunDirectory:
    """A loop that is not ours, and holds its lock."""
    about = ForeignRun(
        loop="pytorch", model="Net", parameters=168, optimizer="AdamW", scaler="GradScaler",
        every=100, settings={"optimizer.lr": 0.001, "scaler.init_scale": 65536.0},
    )  # fmt: skip
    return RunDirectory.create_foreign(about, ENVIRONMENT, path)


def dated(path: Path, minutes: float, took: float = 60.0, size: int = 0) -> Path:
    """Say that a run began some minutes before `NOW`, took so many seconds, and fills so much."""
    began = NOW - 60 * minutes
    for file in (path / "attempts").rglob("*"):
        os.utime(file, (began, began))
    if (path / "steps.jsonl").exists():
        os.utime(path / "steps.jsonl", (began + took, began + took))
    if size:  # so much that a recipe's bytes do not count
        with (path / "weights").open("wb") as file:
            file.truncate(size)
    return path


def all_states(folder: Path, stack: ExitStack) -> None:
    """Twenty runs in `folder/runs`; `stack` ends those that run."""
    for number, run in enumerate(_all_states(folder / "runs", stack)):
        dated(run, minutes=200 - 7 * number, took=90 + 100 * number, size=(number + 1) * 2**30 // 3)


def _all_states(runs: Path, stack: ExitStack) -> Iterator[Path]:
    for seed in range(3):
        accuracy = 0.94 + 0.003 * seed
        fp32, fp16 = (runs / "small" / f"20270115T0{n}{seed}000Z-1a2b3c4{n}" for n in (1, 2))
        yield make_run(
            fp32, f"train.seed={seed}", metrics={"accuracy": accuracy, "loss": 0.21}, noise=0.01
        )
        yield make_run(
            fp16, f"train.seed={seed}", "precision.mode=fp16", skipped=(1, 2), noise=0.02,
            metrics={"accuracy": accuracy - 0.011 - 0.001 * seed, "loss": 0.22},
            result={"wall_seconds": 7300.0 + seed},
        )  # fmt: skip
    (runs / "small" / "latest").symlink_to("20270115T022000Z-1a2b3c42")
    trials = runs / "small" / "sweep-loss-scale-1a2b3c4d" / "trials"
    yield make_run(trials / "scale=256-seed0", "precision.mode=fp16", metrics={"accuracy": 0.91})
    yield make_run(
        trials / "scale=65536-seed0", "precision.mode=fp16-master", status="diverged", done=31,
        skipped=range(20, 32), metrics={"accuracy": 0.1},
    )  # fmt: skip
    yield make_run(runs / "diverged", "precision.mode=fp16-pure", status="diverged", done=7)
    yield make_run(runs / "out-of-memory", status="failed", done=0)
    yield make_run(runs / "no-space", status="failed", done=40, metrics={"f1": 0.5})
    yield make_run(runs / "killed", status=None, done=62, metrics={"masked_accuracy": 0.4512})
    yield make_run(runs / "killed-at-once", status=None, done=0)
    yield make_run(runs / "preempted", "precision.mode=bf16", status="preempted", done=55)
    yield make_run(runs / "interrupted", "precision.mode=bf16-master", status="interrupted", done=3)
    recording = begin_recording(runs / "recorded")
    recording.append_steps(row(step) for step in range(1, 21))
    recording.close()
    yield recording.path
    running = begin_run(runs / "running", "precision.mode=fp16", steps=1000)
    stack.callback(running.close)
    running.append_steps(row(step) for step in range(1, 421))
    running.append_evaluation(evaluation(400, accuracy=0.8833))
    yield running.path
    recorded_now = begin_recording(runs / "recording")
    stack.callback(recorded_now.close)
    yield recorded_now.path
    damaged = make_run(runs / "damaged-result")
    (damaged / "result.json").write_bytes(b"\x00\xff{")
    yield damaged
    without_recipe = make_run(runs / "lost-recipe")
    (without_recipe / "recipe.yaml").unlink()
    yield without_recipe
