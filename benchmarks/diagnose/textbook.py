"""The textbook's three rules, each where it is right and where it is wrong, by our own runs.

python -m benchmarks.diagnose.textbook    # writes its table to docs/diagnose.md
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.diagnose.faults import FP32, Cell, cells
from benchmarks.diagnose.jobs import one_thread
from benchmarks.diagnose.runs import OPTIM, RECIPE, Trained, machine, plugin, train
from benchmarks.diagnose.table import ROOT, docs
from benchmarks.diagnose.task import Family
from mpcli.diagnose.rerun import State, run_steps
from mpcli.plan import make_plan
from mpcli.recipe.load import load_recipe

SEED = 8
CLIP = "train.clip={kind: norm, max_norm: 0.5}"


class Rule(NamedTuple):
    """A rule followed in one of the benchmark's faulty trainings."""

    rule: str
    fault: str
    family: Family
    change: str
    means: str


RULES = (
    Rule("does not converge: raise the loss scale", "underflow", "mlp",
         "precision.loss_scale={kind: static, scale: 1024}", "scale 1e-6 -> 1024"),
    Rule("", "scale-collapse", "mlp",
         "precision.loss_scale={kind: dynamic, init_scale: 16777216, min_scale: 6e-8}",
         "first scale 2^16 -> 2^24"),
    Rule("", "learning-rate", "mlp",
         "precision.loss_scale={kind: dynamic, init_scale: 1048576}", "first scale 2^16 -> 2^20"),
    Rule("NaN: clip the gradients", "exploding-gradients", "residual", CLIP, "norm 0.5"),
    Rule("", "backward-nonfinite", "mlp", CLIP, "norm 0.5"),
    Rule("", "forward-overflow", "residual", CLIP, "norm 0.5"),
)  # fmt: skip
MEMORY = "memory explodes: switch autocast off"
BATCHES = {"transformer": 64, "mlp": 1}


def main() -> None:
    one_thread()
    rows = [row(rule) for rule in RULES] + list(memory_rows())
    header = ("rule", "fault", "what was done", "before", "after", "")
    text = docs().table(header, rows)
    page = ROOT / "docs" / "diagnose.md"
    before = page.read_text("utf-8")
    page.write_text(docs().between(before, "textbook", text, "benchmarks/diagnose/textbook.py"))


def row(rule: Rule) -> tuple[str, ...]:
    """Losses of held-out images without and with the rule."""
    cell = cells(SEED)[f"{rule.fault}/{rule.family}"]
    assert isinstance(cell, Cell)
    faulty = [s for s in cell.faulty if s != FP32]  # all of these rules are told of fp16
    kept = [s for s in faulty if not s.startswith(rule.change.partition("=")[0])]
    before, after = trained(cell.family, faulty), trained(cell.family, [*kept, rule.change])
    verdict = "right" if after.loss < 0.8 * min(before.loss, 1e9) else "wrong"
    about = f"`{rule.fault}`, {rule.family}"
    return rule.rule, about, rule.means, told(before), told(after), f"**{verdict}**"


def trained(family: Family, overrides: Sequence[str]) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        return train(family, overrides, SEED, Path(folder))


def told(training: Trained) -> str:
    return f"loss {training.loss:.2f}, {training.skipped:.0%} skipped"


def memory_rows() -> list[tuple[str, ...]]:
    """Bytes of the tensors that a step holds at most, in fp16 under autocast and in fp32."""
    rows = []
    for family, batch in BATCHES.items():
        half, fp32 = (peak(family, batch, mode) for mode in ("fp16", "fp32"))
        verdict = "right" if fp32 < half else "wrong"
        about = f"none, {family}, batch {batch}"
        sizes = [f"{size / 1024:,.0f} KiB" for size in (half, fp32)]
        first = MEMORY if not rows else ""
        rows.append((first, about, "fp16 -> fp32", *sizes, f"**{verdict}**"))
    return rows


def peak(family: str, batch: int, mode: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(RECIPE.format(family=family, optim=OPTIM[family], seed=SEED), "utf-8")
        settings = [f"precision.mode={mode}", f"train.global_batch_size={batch}"]
        recipe = load_recipe(path, settings, plugin()).recipe
    plan = make_plan(recipe, machine())
    return run_steps(recipe, plan, State(0, None), 2, lambda text: None).peak_memory


if __name__ == "__main__":
    main()
