"""Run directories made up, of any size and with any text in them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from mpcli.records import LayerRecord, StepRecord, strict_json

RECIPE = """\
name: made-up
precision:
  mode: fp16
train:
  steps: {steps}
"""


def made_up_run(
    path: Path, *, steps: int = 40, sampled: int = 4, layers: int = 2, prefix: str = "block"
) -> Path:
    """A run of so many steps, every 97th of them skipped, with sampled steps of so many layers."""
    attempt = path / "attempts" / "1"
    attempt.mkdir(parents=True)
    (path / "recipe.yaml").write_text(RECIPE.format(steps=steps))
    (path / "recipe.source.yaml").write_text(RECIPE.format(steps=steps))
    (attempt / "environment.json").write_text(json.dumps({"torch": "2.14.1"}))
    with (path / "steps.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(step_row(step, skipped=step % 97 == 0) + "\n")
    with (path / "layers.jsonl").open("w") as file:
        for step in range(1, steps + 1, max(1, steps // sampled)):
            file.writelines(row + "\n" for row in layer_rows(step, layers, prefix))
    (path / "evals.jsonl").write_text(
        json.dumps({"step": steps, "attempt": 1, "loss": 0.5, "ema": False, "seconds": 1.0}) + "\n"
    )
    (path / "result.json").write_text(strict_json(result(steps)))
    return path


def step_row(step: int, *, skipped: bool = False, **changes: Any) -> str:
    """A row of `steps.jsonl`."""
    fields = {
        "step": step, "attempt": 1, "loss": 2 / math.sqrt(step) + 0.1 * math.sin(step * 1.7),
        "lr": 0.1, "grad_norm": math.inf if skipped else 1 + 0.3 * math.cos(step * 2.3),
        "scale": 65536.0, "applied": not skipped, "samples_per_second": 1000 + step % 7,
        "memory_allocated_bytes": 10**8, "memory_peak_bytes": 2 * 10**8,
    }  # fmt: skip
    return StepRecord(**(fields | changes)).to_json()


def layer_rows(step: int, layers: int, prefix: str) -> list[str]:
    """Rows of `layers.jsonl`: eight tensors of each layer, as one with weight and bias has."""
    rows, numbers = [], random.Random(step)
    for layer in range(layers):
        module = f"{prefix}.{layer}.attention.output.dense"
        kinds = [("output", module), ("grad_output", module)]
        for name in ("weight", "bias"):
            kinds += [(kind, f"{module}.{name}") for kind in ("weight", "grad", "update")]
        for kind, name in kinds:
            spread = numbers.random() * 100
            counts = [int(16_384 * 2 ** (-numbers.random() * 14)) for _ in range(35)]
            row = LayerRecord.model_construct(
                step=step, attempt=1, rank=0, module=module, tensor=kind, name=name, call=0,
                dtype="fp16", scale=65536.0, elements=589_824, sampled=16_384,
                max=spread * 1.37, rms=spread * 0.0137, zeros=spread / 1000, nan=0, inf=0,
                at_least_65520=0.0, subnormal=spread / 3000, would_flush=spread / 7000,
                lowest_exponent=-24 - numbers.randrange(5), exponents=counts,
                lowest_unscaled_exponent=-40.0,
                update_ratio=spread / 1e4 if kind == "update" else None,
                lost=spread / 2e3 if kind == "update" else None, shadow=None,
            )  # fmt: skip
            rows.append(strict_json(vars(row)))
    return rows


def result(steps: int, **changes: Any) -> dict[str, Any]:
    """What `result.json` says."""
    return {
        "version": 1, "status": "done", "exit_code": 0, "reason": None, "name": "made-up",
        "steps_attempted": steps, "steps_applied": steps, "steps_skipped": 0,
        "metrics": {"train": {"loss": 0.4}, "eval": {"loss": 0.5}}, "wall_seconds": 12.5,
        "input_share": 0.1, "peak_memory_bytes": 2 * 10**8, "checkpoint": None,
        "best_checkpoint": None, "problems": [], **changes,
    }  # fmt: skip


def finding(**changes: Any) -> dict[str, Any]:
    """One of `diagnose --json`."""
    return {
        "id": "underflow", "severity": "error", "cause": "gradients become zero",
        "layers": ["block.0"], "phase": "backward", "step": 3, "confidence": 1.0,
        "evidence": {"share": 0.5},
        "suggestion": {"what": "scale the loss", "set": ["precision.loss_scale.kind=dynamic"]},
        "verified": True, **changes,
    }  # fmt: skip
