"""Loss curves on real CIFAR-10 with one process and with two (`make verify`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify.page import Rows, machine, run, write

pytestmark = pytest.mark.verify
STEPS, WINDOW, FIRST = 100, 25, 3
TWO = ("engine.processes=2", "engine.device=cpu")


def test_two_processes_learn_what_one_learns(tmp_path: Path, shared_data: Path) -> None:
    """`cifar10-fp32`, whose BatchNorm sees 128 images in one process and 64 in each of two.

    So beside one process there is one that cuts its batches as two do: from that, two differ only
    by the order of sums, which at this learning rate grows threefold in a step.
    """
    engines = {
        "one process": (),
        "one process, micro-batches of 64": ("train.micro_batch_size=64",),
        "ddp, 2 processes": ("engine.kind=ddp", *TWO),
        "fsdp2, 2 processes": ("engine.kind=fsdp2", *TWO),
    }
    length = (f"train.steps={STEPS}", "output.checkpoint_every=null")
    curves, accuracy = {}, {}
    for number, (name, overrides) in enumerate(engines.items()):
        result, curves[name] = run(
            tmp_path / str(number),
            "cifar10-fp32.yaml",
            *length,
            *overrides,
            processes=2 if "engine.processes=2" in overrides else 1,
        )
        accuracy[name] = result["metrics"]["eval"]["accuracy"]
    same_cut = curves["one process, micro-batches of 64"]
    rows: Rows = []
    for name, curve in curves.items():
        end = sum(curve[-WINDOW:]) / WINDOW
        apart = [abs(a / b - 1) for a, b in zip(curve, same_cut, strict=True)]
        rows.append(
            (
                f"`cifar10-fp32`, {STEPS} steps, {name}",
                f"mean loss of the last {WINDOW} steps {end:.4f}, accuracy {accuracy[name]:.2%}; "
                f"beside one process with micro-batches of 64, its losses are at most "
                f"{max(apart[:FIRST]):.1e} apart in {FIRST} steps, {max(apart):.1e} in all",
            )
        )
        assert end == pytest.approx(sum(same_cut[-WINDOW:]) / WINDOW, rel=0.05)
        if name.startswith(("ddp", "fsdp2")):
            assert max(apart[:FIRST]) < 1e-6
    write("scaling", rows, machine())
