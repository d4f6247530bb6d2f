"""Loss curves of BERT-tiny with DeepSpeed, beside one process without (`make verify`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify.page import Rows, machine, run, write

pytestmark = pytest.mark.verify
STEPS, FIRST = 20, 5


def test_zero_offload_learns_what_one_process_learns(tmp_path: Path) -> None:
    """Adam divides small gradients by each other: what is apart by 1e-7 grows with the steps."""
    engines = {
        "local": ("engine={kind: local, device: cpu}", 1),
        **{
            f"ZeRO-{stage} with offload, {processes} process{'es' * (processes - 1)}": (
                f"engine={{kind: deepspeed, device: cpu, stage: {stage}, offload: true, "
                f"processes: {processes}}}",
                processes,
            )
            for stage in (2, 3)
            for processes in (1, 2)
        },
    }
    length = (
        *(f"train.steps={STEPS}", "train.global_batch_size=16"),
        *("output.checkpoint_every=null", "eval.every=null"),
    )
    curves, losses = {}, {}
    for number, (name, (engine, processes)) in enumerate(engines.items()):
        result, curves[name] = run(
            tmp_path / str(number), "bert-tiny-mlm.yaml", *length, engine, processes=processes
        )
        losses[name] = result["metrics"]["eval"]["loss"]
    rows: Rows = []
    for name, curve in curves.items():
        apart = [abs(a / b - 1) for a, b in zip(curve, curves["local"], strict=True)]
        shown = " ".join(f"{curve[step - 1]:.4f}" for step in range(FIRST, STEPS + 1, FIRST))
        rows.append(
            (
                f"`bert-tiny-mlm`, {STEPS} steps, {name}",
                f"losses after {FIRST}, {2 * FIRST}, ... steps {shown}; evaluation loss "
                f"{losses[name]:.4f}; beside local, losses are at most {max(apart[:FIRST]):.1e} "
                f"apart in {FIRST} steps, {max(apart):.1e} in all",
            )
        )
        assert max(apart[:FIRST]) < 1e-5
        assert losses[name] == pytest.approx(losses["local"], rel=1e-3)
    write("deepspeed", rows, machine())
