"""`mptrain sweep`: what it asks of its runs, and what it shows of them; the runs are made up."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mpcli.cli import sweep
from mpcli.sweep import jobs
from mpcli.sweep.folder import SweepFolder
from mpcli.sweep.recommendation import LossScaleSweep
from mpcli.sweep.results import (
    Fractions,
    GradientError,
    GradientHistogram,
    LayerFractions,
    TrialResult,
)

# Of a tensor whose magnitudes are spread evenly in log2 from 2^-30 to 2^-11.
HISTOGRAM = GradientHistogram(
    module="conv", tensor="grad", name="conv.weight", elements=2000, max=2.0**-11, zeros=0.0,
    lowest=-30, counts=(100,) * 19,
)  # fmt: skip


def made_up(cell, **about):
    """What a run of a cell may have given: fp32, or fp16 that is as good."""
    fp32 = cell.label in ("fp32", "bf16")
    layer = LayerFractions(
        module="conv", tensor="grad", name="conv.weight", elements=2000,
        fractions=Fractions(underflow=0.25, subnormal=0.5, overflow=0.0),
    )  # fmt: skip
    values = {
        "label": cell.label, "seed": cell.seed, "settings": cell.settings, "run": cell.name,
        "status": "done", "steps": 10, "skipped": 0, "first_loss": 2.0, "loss": 1.0,
        "metrics": {"loss": 1.0, "accuracy": 0.9 + 0.01 * cell.seed},
        "seconds_per_step": 0.01, "peak_memory_bytes": 0,
        "histograms": (HISTOGRAM,) if fp32 else (), "layers": () if fp32 else (layer,),
        "gradient_error": None if fp32 else GradientError(cosine=0.999, relative=0.01),
    } | about  # fmt: skip
    return TrialResult(**values)


@dataclass
class Sweeps:
    """What was asked of `run_sweep`; and, by label, what its results have that others have not."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    servers: list[str] = field(default_factory=list)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)


@pytest.fixture
def sweeps(monkeypatch, tmp_path):
    """Sweeps that run nothing."""
    seen = Sweeps()

    def run_sweep(folder, loaded, cells, *, kind, asked, **how):
        SweepFolder(folder).prepare(loaded, kind, asked)
        seen.asked.append({"folder": Path(folder), "cells": cells, "asked": asked, **how})
        how["tell"]("1/1 a run")
        return [made_up(cell, **seen.about.get(cell.label, {})) for cell in cells]

    monkeypatch.setattr(jobs, "run_sweep", run_sweep)
    monkeypatch.setattr(jobs, "start_server", lambda: seen.servers.append("begins to import"))
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("sweep loss-scael r.yaml", "unknown command `loss-scael`", "did you mean `loss-scale`?"),
        ("sweep precision", "missing argument `RECIPE`", "`mptrain sweep precision --help` shows"),
        ("sweep grid", "missing argument `RECIPE`", "`mptrain sweep grid --help` shows"),
        ("sweep grid r.yaml --ovr a=1", "unknown option `--ovr`", "did you mean `--over`?"),
        ("sweep --jobs 2", "unknown option `--jobs`", "it belongs after the command, such as"),
        ("sweep loss-scale r.yaml --seeds 0", "invalid value for `--seeds`", "`mptrain sweep"),
        ("sweep grid r.yaml", "nothing to sweep over", "add `--over`"),
        ("sweep loss-scale r.yaml --values 2^200", "--values: `2^200` is not between", "such as"),
        ("swep", "unknown command `swep`", "did you mean `sweep`?"),
    ],
)
def test_usage_errors(mptrain, arguments, message, hint):
    outcome = mptrain(*arguments.split())
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.lower().startswith(f"error: {message.lower()}")
    assert f"\n  help: {hint}" in outcome.err


def test_alone_it_prints_its_help(mptrain):
    outcome = mptrain("sweep")
    assert outcome.code == 0
    assert outcome.out == mptrain("sweep", "--help").out
    assert all(f"\n  {name} " in outcome.out for name in ("loss-scale", "precision", "grid"))
    assert "..." not in outcome.out.partition("Commands:")[2]


def test_importing_the_command_line_loads_neither_optuna_nor_torch():
    code = (
        "import sys, mpcli.cli.sweep, mpcli.cli.sweep_text; "
        "print({'torch', 'optuna', 'numpy', 'scipy', 'plotext', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_mode_without_a_loss_scale_is_refused(mptrain, recipe, sweeps):
    outcome = mptrain("sweep", "loss-scale", recipe, "--set", "precision.mode=bf16")
    assert outcome.code == 2
    assert "precision.mode: mode `bf16` has no loss scale to sweep" in outcome.err
    assert "help: add `--set precision.mode=fp16`" in outcome.err
    assert not sweeps.asked


def test_loss_scale_asks_for_every_scale_and_confirms_what_it_recommends(mptrain, recipe, sweeps):
    outcome = mptrain("sweep", "loss-scale", recipe, "--values", "1,2^8", "--jobs", "2")
    assert outcome.code == 0, outcome.err
    first, second = sweeps.asked
    assert "each run has 3 of the recipe's 6 steps; `--steps` changes it\n" in outcome.err
    assert [cell.label for cell in first["cells"]] == ["fp32", "scale=1", "scale=256"]
    assert [cell.label for cell in second["cells"]][3:] == ["recommended"]
    assert first["jobs"] == 2 and first["storage"] is None
    assert first["asked"] == second["asked"] == {
        "steps": 3, "seeds": [0], "values": [1.0, 256.0],  # half of the recipe's
    }  # fmt: skip
    assert re.fullmatch("runs/tiny/sweep-loss-scale-[0-9a-f]{8}", str(first["folder"]))
    assert "1/1 a run" in outcome.err and "1/1 a run" not in outcome.out


def test_an_answer_that_its_run_changes_is_followed_by_the_next_one(mptrain, recipe, sweeps):
    nothing_lost = HISTOGRAM.model_copy(update={"lowest": -20, "max": 2.0**-1})
    sweeps.about["fp32"] = {"histograms": (nothing_lost,)}
    sweeps.about["recommended"] = {"loss": 2.0}
    outcome = mptrain("sweep", "loss-scale", recipe, "--values", "2^8", "--json")
    labels = [[cell.label for cell in asked["cells"]] for asked in sweeps.asked]
    assert labels[0] == ["fp32", "scale=256"]
    assert labels[1:] == [
        ["fp32", "scale=256", "recommended"],
        ["fp32", "scale=256", "recommended", "recommended-2"],
    ]
    none, dynamic = (cell.settings[-1] for cell in sweeps.asked[-1]["cells"][2:])
    assert none == "precision.loss_scale={kind: none}"
    assert outcome.json["recommended"]["set"] == dynamic != none
    assert outcome.json["recommended"]["confirmed"]
    shown = mptrain("sweep", "loss-scale", recipe, "--values", "2^8").out
    assert re.findall("^advised[^ ]*", shown, re.MULTILINE) == ["advised", "advised-2"]


def test_what_runs_at_a_scale_of_1_confirm_is_not_run_once_more(mptrain, recipe, sweeps):
    nothing_lost = HISTOGRAM.model_copy(update={"lowest": -20, "max": 2.0**-1})
    sweeps.about["fp32"] = {"histograms": (nothing_lost,)}
    outcome = mptrain("sweep", "loss-scale", recipe, "--values", "1", "--json")
    assert outcome.json["recommended"]["policy"] == "none"
    assert len(sweeps.asked) == 1


def test_answers_that_never_end_are_tried_three_times(mptrain, recipe, sweeps, monkeypatch):
    def another(self):
        setting = f"precision.loss_scale={{kind: dynamic, init_scale: {2 ** len(self.trials)}}}"
        return {
            "set": setting, "confirmed": False, "why": "so it is", "knee": None, "init_scale": None,
        }  # fmt: skip

    monkeypatch.setattr(LossScaleSweep, "recommended", another)
    assert mptrain("sweep", "loss-scale", recipe, "--values", "1").code == 0
    assert len(sweeps.asked) == 1 + 3


def test_loss_scale_shows_predicted_beside_measured_a_plot_and_a_patch(mptrain, recipe, sweeps):
    sweeps.about["scale=16777216"] = {
        "status": "diverged", "skipped": 10, "loss": None, "reason": "10 steps skipped",
    }  # fmt: skip
    outcome = mptrain("sweep", "loss-scale", recipe, "--values", "2^-4,1,2^8,2^24,dynamic")
    lines = [re.split(r"  +", line) for line in outcome.out.splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) > 5}
    # 2^-30 .. 2^-26 of 2^-30 .. 2^-12 are lost at 1: five bins of nineteen
    assert table["2^0 1"][:4] == [f"{5 / 19:.1%}", f"{11 / 19:.1%}", "0", "25.0%"]
    assert table["2^8 256"][0] == "0"
    assert table["2^-4"][0] == "unreliable"
    assert table["2^24"][-2:] == ["100.0%", "0.9990"]
    assert table["dynamic"][0] == "-"
    assert "\nscale=16777216 seed 0: diverged: 10 steps skipped\n" in outcome.out
    assert "`.` predicted lost" in outcome.out and "└┬" in outcome.out
    assert "\n  --set 'precision.loss_scale={kind: dynamic, init_scale: " in outcome.out
    assert f"\n--- {recipe}\n+++ {recipe}\n@@ " in outcome.out
    assert "\n-precision: {mode: fp16}\n+precision: {mode: fp16, loss_scale: " in outcome.out
    assert "\x1b" not in outcome.out
    assert max(map(len, outcome.out.partition("%")[0].splitlines())) <= 80


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n"])
@pytest.mark.parametrize(
    ("mode", "given"),
    [("fp16", []), ("fp32", ["--set", "precision.mode=fp16", "--set", "optim.lr=0.2"])],
)
def test_the_patch_applies_and_gives_what_is_recommended(
    mptrain, recipe, sweeps, tmp_path, mode, given, end
):
    text = recipe.read_text().replace("fp16", mode).rstrip()
    text = (text.replace("\n", "\r\n") if "\r" in end else text) + end
    recipe.write_text(text, newline="")
    (tmp_path / "before.yaml").write_text(text, newline="")
    out = mptrain("sweep", "loss-scale", recipe, "--values", "1", *given).out
    assert ("\nThe patch holds every `--set` of this command" in out) == bool(given)
    setting = re.search(r"--set '(.*)'", out)[1]
    patch = out[out.index("\n--- ") + 1 :]
    (tmp_path / "change.patch").write_text(patch, newline="")
    done = subprocess.run(
        ["patch", "--binary", recipe, "change.patch"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == f"patching file {recipe}\n"  # without fuzz or offset
    after = mptrain("plan", recipe, "--json").json["recipe"]
    wanted = mptrain("plan", tmp_path / "before.yaml", *given, "--set", setting, "--json")
    assert after == wanted.json["recipe"]


def test_loss_scale_names_the_large_layer_that_loses_most(mptrain, recipe, sweeps):
    # At 2 all of the small one is lost and 0.5% of the large one, which is 1% of both.
    large = HISTOGRAM.model_copy(
        update={"elements": 20_000, "lowest": -31, "counts": (5, 0, 0, 0, 0, 995), "max": 2.0**-25}
    )
    update = {"name": "conv.bias", "elements": 100, "lowest": -70, "counts": (9,), "max": 0.0}
    small = HISTOGRAM.model_copy(update=update)
    held = [
        LayerFractions(
            module="conv", tensor="grad", name=one.name, elements=one.elements,
            fractions=Fractions(underflow=0.25, subnormal=0.5, overflow=0.0),
        )
        for one in (large, small)
    ]  # fmt: skip
    sweeps.about["fp32"] = {"histograms": (large, small)}
    sweeps.about["scale=256"] = {"layers": held}
    outcome = mptrain("sweep", "loss-scale", recipe, "--values", "2^8")
    line = "Predicted to lose most, of those with more than 1,000 elements: at the knee 2^1 "
    assert f"\n{line}`conv.weight`, 0.5%.\n" in outcome.out  # at 2^24 nothing of it
    assert "Window: 2^1 to 2^32, 31 bits." in outcome.out


def test_loss_scale_as_json_is_one_strict_object(mptrain, recipe, sweeps):
    sweeps.about["scale=256"] = {"loss": float("nan"), "status": "diverged"}
    outcome = mptrain("sweep", "loss-scale", recipe, "--values", "1,256", "--json")
    found = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(name))
    assert found["status"] == "done" and found["exit_code"] == outcome.code == 0
    assert found["kind"] == "loss-scale" and found["name"] == "tiny"
    assert found["recommended"]["set"].startswith("precision.loss_scale={kind: ")
    assert [row["scale"] for row in found["rows"]][:2] == [1.0, 256.0]
    assert [trial["label"] for trial in found["trials"]][:3] == ["fp32", "scale=1", "scale=256"]
    assert [one["scale"] for one in found["predicted"]] == [2.0**power for power in range(-8, 33)]
    assert found["predicted"][8]["layers"][0]["name"] == "conv.weight"
    written = json.loads((sweeps.asked[0]["folder"] / "result.json").read_text())
    assert written == found


def test_the_same_question_has_the_same_folder_and_another_one_another(mptrain, recipe, sweeps):
    command = ("sweep", "loss-scale", recipe, "--values", "1")
    for more in ((), ("--jobs", "2", "--set", "output.keep_last=3"), ("--steps", "4"),
                 ("--set", "optim.lr=0.2")):  # fmt: skip
        assert mptrain(*command, *more).code == 0
    first, again, *others = (asked["folder"] for asked in sweeps.asked[::2])
    assert first == again
    assert len({*others, first}) == 3


def test_output_names_the_folder(mptrain, recipe, sweeps, tmp_path):
    arguments = ("sweep", "loss-scale", recipe, "--values", "1", "--output")
    assert mptrain(*arguments, tmp_path / "mine").code == 0
    assert (tmp_path / "mine" / "result.json").exists()
    assert mptrain(*arguments, "").code == 2
    other = mptrain(*arguments, tmp_path)
    assert other.code == 2
    assert "holds no sweep" in other.err


def test_without_any_finished_run_the_exit_code_says_so(mptrain, recipe, sweeps):
    for label in ("fp32", "scale=1"):
        sweeps.about[label] = {"status": "diverged", "loss": None}
    outcome = mptrain("sweep", "loss-scale", recipe, "--values", "1", "--json")
    assert outcome.code == outcome.json["exit_code"] == 5


def test_precision_compares_the_modes_that_can_be(mptrain, recipe, sweeps):
    sweeps.about["fp16"] = {"metrics": {"loss": 1.0, "accuracy": 0.5}}
    outcome = mptrain(
        "sweep", "precision", recipe, "--seeds", "3", "--set", "optim={kind: adamw, lr: 1e-3}"
    )
    assert outcome.code == 0, outcome.err
    modes = list(dict.fromkeys(cell.label for cell in sweeps.asked[0]["cells"]))
    left_out = re.findall(r"^(\S+) is left out: ", outcome.err, re.MULTILINE)
    assert modes[:3] == ["fp32", "bf16", "fp16"]
    assert {*modes, *left_out} == {"fp32", "bf16", "fp16", "bf16-master", "fp16-master"}
    assert re.search(r"^fp32 +91\.00% ± 0\.58 +- +- +10 ms +1\.00x +1\.00x$", outcome.out, re.M)
    # 0.50 in every seed against 0.90, 0.91, 0.92
    assert re.search(r"^fp16 +50\.00% ± 0\.00 +-41\.00 ± 0\.58 +0\.00\d \*", outcome.out, re.M)
    assert "paired t-test" in outcome.out


def test_precision_says_what_is_not_tested_and_what_is_left_out(mptrain, recipe, sweeps):
    sweeps.about["bf16"] = {"metrics": {"loss": 1.0, "accuracy": float("nan")}}
    command = ("sweep", "precision", recipe, "--modes", "fp32,bf16,fp16,fp16-master", "--seeds", 3)
    outcome = mptrain(*command)  # fp16 is as fp32 in every seed: tested
    assert "after Holm's correction for 2 tests. No p: fewer than two pairs, or" in outcome.out
    assert "bf16: 3 of 3 runs are left out (done without a finite accuracy)" in outcome.out
    assert "No p:" not in mptrain(*command[:4], "fp32,fp16", *command[5:]).out


def test_only_modes_with_a_p_value_are_corrected_for(mptrain, recipe, sweeps):
    sweeps.about["fp16"] = {"status": "diverged", "metrics": {}}
    outcome = mptrain("sweep", "precision", recipe, "--modes", "fp32,bf16,fp16", "--seeds", "3")
    assert outcome.code == 0, outcome.err
    assert "paired t-test." in outcome.out
    assert "Holm" not in outcome.out


def test_precision_with_one_seed_says_that_it_has_no_errors(mptrain, recipe, sweeps):
    outcome = mptrain("sweep", "precision", recipe, "--modes", "fp32,fp16")
    assert "One seed: no standard errors" in outcome.out
    assert "±" not in outcome.out


def test_a_mode_that_was_asked_for_and_cannot_be_is_an_error(mptrain, recipe, sweeps):
    outcome = mptrain(
        "sweep", "precision", recipe, "--modes", "fp32,fp16-pure",
        "--set", "optim={kind: adafactor, lr: 0.05}",
    )  # fmt: skip
    assert outcome.code == 2
    assert "with `fp16-pure`" in outcome.err
    assert not sweeps.asked


@pytest.mark.parametrize(
    "command",
    [("loss-scale",), ("precision", "--modes", "fp32,fp16"), ("grid", "--over", "optim.lr=1,2")],
)
def test_processes_begin_to_import_beside_the_planning(
    mptrain, recipe, sweeps, monkeypatch, command
):
    plan = sweep.planned_for
    planned = []

    def planned_for(*arguments, **options):
        planned.append(len(sweeps.servers))
        return plan(*arguments, **options)

    monkeypatch.setattr(sweep, "planned_for", planned_for)
    kind, *options = command
    assert mptrain("sweep", kind, recipe, *options).code == 0
    assert planned and set(planned) == {1}


@pytest.mark.parametrize(
    "command",
    [
        ("loss-scale", "--output", ""),
        ("loss-scale", "--set", "precision.mode=fp32"),
        ("precision", "--modes", "fp16"),
        ("grid", "--over", "optim.lr"),
        ("grid", "--over", "optim.lr=1,2", "--set", "optim.l=1"),
    ],
)
def test_a_mistake_starts_no_process(mptrain, recipe, sweeps, command):
    kind, *options = command
    assert mptrain("sweep", kind, recipe, *options).code == 2
    assert not sweeps.servers


def test_one_mode_is_no_comparison(mptrain, recipe, sweeps):
    outcome = mptrain("sweep", "precision", recipe, "--modes", "fp16,fp16")
    assert outcome.code == 2
    assert "one mode has nothing to be beside" in outcome.err


def test_grid_ranks_and_says_what_to_type(mptrain, recipe, sweeps):
    sweeps.about["optim.lr=0.3 train.global_batch_size=8"] = {"metrics": {"accuracy": 0.99}}
    sweeps.about["optim.lr=0.1 train.global_batch_size=8"] = {
        "status": "diverged", "reason": "the loss is NaN", "metrics": {},
    }  # fmt: skip
    outcome = mptrain(
        "sweep", "grid", recipe, "--over", "optim.lr=0.1,0.3", "--over",
        "train.global_batch_size=8,16",
    )  # fmt: skip
    lines = outcome.out.splitlines()
    assert lines[2].split() == [
        "99.00%",
        "0",
        "10",
        "ms",
        "optim.lr=0.3",
        "train.global_batch_size=8",
    ]
    assert lines[5].split()[0] == "-"
    assert "1 of 1 runs are left out (diverged: the loss is NaN)" in outcome.out
    assert outcome.out.endswith("The best:\n  --set optim.lr=0.3 --set train.global_batch_size=8\n")


def test_every_cell_is_checked_before_any_runs(mptrain, recipe, sweeps):
    outcome = mptrain(
        "sweep", "grid", recipe, "--over", "optim.lr=-1,0.1", "--over", "train.clip=1,null,2",
        "--over", "engine.processes=1,2",
    )  # fmt: skip
    assert outcome.code == 2
    assert "`optim.lr=-1 train.clip=1 engine.processes=1`" in outcome.err
    assert "and 5 more" in outcome.err  # the rate is in six cells
    assert "train.clip" in outcome.err and "engine.processes" in outcome.err
    assert not sweeps.asked


def test_problems_of_a_sweep_are_json_too(mptrain, recipe, sweeps):
    outcome = mptrain("sweep", "grid", recipe, "--over", "optim.lr=-1", "--json")
    (problem,) = outcome.json["problems"]
    assert outcome.code == outcome.json["exit_code"] == 2
    assert problem["path"] == "optim.lr"


@pytest.mark.parametrize(("columns", "no_color"), [(80, False), (120, True)])
def test_on_a_terminal_every_line_fits(tmp_path, columns, no_color):
    shown = on_a_terminal(tmp_path, columns, no_color)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r", "").split("\n")
    assert max(map(len, lines)) <= columns
    assert any(line.startswith("scale ") for line in lines)  # a table, not a line for each row
    assert any("unreliable" in line for line in lines)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", shown)  # no colours, as nothing needs them


def on_a_terminal(folder: Path, columns: int, no_color: bool) -> str:
    """The table of a made-up sweep as a terminal gets it."""
    script = folder / "show.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from mpcli.cli.sweep_text import show_loss_scale
from mpcli.sweep.cells import Cell
from mpcli.sweep.recommendation import LossScaleSweep
from mpcli.sweep.results import SweepResult
from tests.cli.test_sweep import made_up
setting = "precision.loss_scale={{{{kind: static, scale: {{}}}}}}".format
cells = [Cell("fp32", (), 0)] + [
    Cell(f"scale={{2.0**p:.10g}}", (setting(2.0**p),), 0)
    for p in (-8, 0, 16, 24)
]
found = LossScaleSweep([made_up(cell) for cell in cells])
show_loss_scale(SweepResult(kind="loss-scale", name="tiny", study="s", steps=10, seeds=(0,),
                            rows=found.rows(), trials=found.trials), found.prediction)
"""
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    environment |= {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    if no_color:
        environment["NO_COLOR"] = "1"
    main, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, script], stdout=child, stdin=subprocess.DEVNULL, env=environment
    )
    os.close(child)
    output = bytearray()
    try:
        while part := os.read(main, 4096):
            output += part
    except OSError:  # the terminal's other end is closed
        pass
    finally:
        os.close(main)
        process.wait()
    return output.decode()
