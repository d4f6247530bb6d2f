"""`mptrain diagnose`: tables and JSON of the evidence in one place."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shlex
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mpcli import Recorder
from mpcli.cli import console, findings
from mpcli.cli.app import main
from mpcli.recipe.errors import Exit
from mpcli.records import FlightRecord, LayerRecord, NonFiniteOrigin, ShadowComparison, StepRecord
from mpcli.rundir import RunDirectory
from tests.diagnose.faulty_runs import faulty_run
from tests.small import run_small


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDirectory:
    """A finished run of four steps, with rows of a probe."""
    run, _ = run_small(tmp_path_factory.mktemp("run"), "precision.mode=bf16")
    return run


def layer(step: int, name: str, **changed: object) -> LayerRecord:
    return LayerRecord.model_validate({
        "step": step, "attempt": 1, "module": name, "tensor": "output", "name": name,
        "dtype": "fp16", "scale": 1.0, "elements": 10, "sampled": 10, "max": 1.0, "rms": 1.0,
        "zeros": 0.25, "nan": 0, "inf": 0, "at_least_65520": 0.0, "subnormal": 0.5,
        "would_flush": None, "lowest_exponent": -1, "exponents": (10,),
        "lowest_unscaled_exponent": -1.0, **changed,
    })  # fmt: skip


def step(number: int, **changed: object) -> StepRecord:
    return StepRecord.model_validate({
        "step": number, "attempt": 1, "loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "scale": 8.0,
        "applied": True, "samples_per_second": 1.0, "memory_allocated_bytes": 1,
        "memory_peak_bytes": 1, **changed,
    })  # fmt: skip


def test_the_json_has_the_shape_of_the_contract(mptrain, run):
    outcome = mptrain("diagnose", run.path, "--no-replay", "--json")
    assert outcome.code == 0
    found = outcome.json
    assert list(found)[:3] == ["verdict", "findings", "margins"]
    assert found["findings"] == []
    assert (found["margins"]["skip_rate"], found["margins"]["flushed_share"]) == (0.0, None)
    assert 0 < found["margins"]["forward_headroom_bits"] < 20
    assert (found["status"], found["exit_code"]) == ("done", 0)
    assert found["verdict"] == (
        "no problem found; done; 0 of 4 steps skipped; weights: fits fp16; "
        "optimizer: all of its state is finite; loss scale: 1"
    )
    evidence = found["evidence"]
    assert evidence["kind"] == "run"
    assert [row["step"] for row in evidence["run"]["last"]] == [1, 2, 3, 4]
    assert evidence["run"]["types"]["head"]["computed"] == "bf16"
    assert evidence["weights_from"] == str(run.path / "checkpoints" / "step-4")
    assert {state["key"] for state in evidence["optimizer"]["states"]} == {"momentum_buffer"}


def test_the_tables_show_what_tells_most(mptrain, run):
    outcome = mptrain("diagnose", run.path, "--evidence", "--no-replay")
    assert outcome.code == 0
    for title in ("Run", "Last steps", "Types in the first step", "Weights", "Layers in fp16",
                  "Optimizer's state", "Loss scale"):  # fmt: skip
        assert f"{title}\n" in outcome.out
    assert outcome.out.splitlines()[-1].startswith(f"{run.path}: done; 0 of 4 steps skipped; ")


def test_without_a_path_it_is_the_newest_run(mptrain, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mptrain("diagnose").code == Exit.USAGE
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "latest").symlink_to(run.path)
    assert mptrain("diagnose", "--json").json["evidence"]["run"]["steps"] == 4


def test_a_checkpoint_and_the_trained_model_of_a_run(mptrain, run):
    checkpoint = mptrain("diagnose", run.path / "checkpoints" / "step-4", "--json").json["evidence"]
    final = mptrain("diagnose", run.path / "final", "--json").json["evidence"]
    assert (checkpoint["kind"], final["kind"]) == ("checkpoint", "folder")
    for fact in ("elements", "max", "zeros", "dtypes"):
        assert checkpoint["weights"]["total"][fact] == final["weights"]["total"][fact]
    assert checkpoint["optimizer"] and not final["optimizer"]


def recorded(run: RunDirectory) -> None:
    """Rows as a recorder writes them: two sampled steps, a step that went wrong."""
    run.append_steps([step(1), step(2, loss=math.nan, applied=False), step(3, scale=4.0)])
    run.append_layers([layer(1, "old")])
    shadow = ShadowComparison(flushed=0.57, overflowed=0.0, error=0.5)
    rows = [layer(2, f"layer.{number}") for number in range(30)]
    run.append_layers([*rows, layer(2, "bad", nan=3), layer(2, "flushed", shadow=shadow)])
    flight = run.flights_path / "step-2"
    flight.mkdir(parents=True)
    origin = NonFiniteOrigin(module="encoder.3", phase="backward", value="inf")
    about = FlightRecord(step=2, attempt=1, loss=math.nan, grad_norm=math.inf, scale=8.0,
                         applied=False, batch="stored", origin=origin)  # fmt: skip
    (flight / "flight.json").write_text(about.to_json())


@pytest.fixture
def foreign(tmp_path) -> RunDirectory:
    """A run of somebody's own loop."""
    from mpcli.records import ForeignRun

    about = ForeignRun(loop="pytorch", model="Net", parameters=1234, optimizer="AdamW",
                       scaler="GradScaler", every=2)  # fmt: skip
    run = RunDirectory.create_foreign(about, {}, tmp_path / "foreign")
    recorded(run)
    run.close()
    return run


def test_a_recorded_run_shows_where_it_went_wrong(mptrain, foreign):
    lines = mptrain("diagnose", foreign.path, "--evidence").out.splitlines()
    table = lines[lines.index("Tensors of step 2") :]
    assert table[1].split()[0] == "tensor"
    assert table[2].split() == ["bad", "output", "fp16", "1", "25.00%", "50.00%", "3", "-"]
    assert table[3].split()[0] == "flushed" and "57.00%" in table[3]
    assert "and 12 more: `--json` has all" in table
    assert "old" not in "\n".join(table)
    assert any(line.endswith("inf made in encoder.3, backward") for line in lines)
    assert any("a pytorch loop, every 2 steps sampled" in line for line in lines)
    assert lines[-1].endswith("1 of 3 steps skipped; losses not finite: 1, the first at step 2")


def test_a_recorded_run_is_whole_in_json(mptrain, foreign):
    found = mptrain("diagnose", foreign.path, "--json").json["evidence"]["run"]
    assert len(found["sampled"]) == 32
    assert found["last"][1]["loss"] == "nan"
    assert (found["steps"], found["skipped"], found["nonfinite_losses"]) == (3, 1, 1)
    assert found["flights"][0]["origin"]["module"] == "encoder.3"
    assert found["foreign"]["model"] == "Net"
    assert found["result"] is None


def test_of_a_long_run_the_last_steps_are_kept(mptrain, foreign):
    run = RunDirectory(foreign.path)
    run.append_steps([step(number) for number in range(4, 2000)])
    run.close()
    with (foreign.path / "steps.jsonl").open("ab") as file:
        file.write(b'{"step": 2000, "torn')
    found = mptrain("diagnose", foreign.path, "--json").json["evidence"]["run"]
    assert found["steps"] == 1999
    assert [row["step"] for row in found["last"]] == list(range(1990, 2000))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(mptrain, tmp_path):
    run, _ = run_small(tmp_path, "output.checkpoint_every=2 steps")
    (run.path / "checkpoints" / "step-4" / "state.json").write_text("x")
    found = mptrain("diagnose", run.path, "--json").json["evidence"]
    assert found["weights_from"].endswith("step-2")
    assert [left["file"] for left in found["not_read"]] == ["checkpoints/step-4"]


def test_a_run_whose_weights_are_all_damaged_still_has_its_rows(mptrain, tmp_path):
    run, _ = run_small(tmp_path, "output.checkpoint_every=4 steps")
    for path in run.path.glob("checkpoints/*/state.json"):
        path.write_text("x")
    (run.path / "final" / "model.safetensors").write_bytes(b"x")
    outcome = mptrain("diagnose", run.path, "--json")
    assert outcome.code == outcome.json["exit_code"] == 0
    assert outcome.json["evidence"]["run"]["steps"] == 4
    not_read = [left["file"] for left in outcome.json["evidence"]["not_read"]]
    assert not_read == ["checkpoints/step-4", "final"]


def test_reading_a_run_leaves_it_as_it_was(mptrain, run):
    def listing() -> list[tuple[str, int, int]]:
        paths = sorted(run.path.rglob("*"))
        return [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in paths]

    before = listing()
    mptrain("diagnose", run.path)
    assert listing() == before


def test_it_exits_0_whatever_it_finds(mptrain, tmp_path):
    weights = {"a.w": torch.tensor([math.nan, math.inf, 1e30])}
    safetensors.torch.save_file(weights, tmp_path / "x.safetensors")
    outcome = mptrain("diagnose", tmp_path / "x.safetensors", "--json")
    assert outcome.code == 0
    assert outcome.json["verdict"].endswith(
        "weights: NaN or infinity in these layers: [a]; needs bf16"
    )
    assert json.dumps(outcome.json, allow_nan=False)


def test_a_file_without_floats_has_no_verdict(mptrain, tmp_path):
    safetensors.torch.save_file({"n": torch.arange(3)}, tmp_path / "x.safetensors")
    outcome = mptrain("diagnose", tmp_path / "x.safetensors", "--evidence")
    assert outcome.code == 0
    assert outcome.out.endswith("x.safetensors: weights: no floating-point values\n")


def test_an_evil_file_ends_in_one_line(mptrain, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    outcome = mptrain("diagnose", tmp_path / "x.bin", "--evidence")
    assert outcome.code == Exit.CHECKPOINT
    assert "Traceback" not in outcome.err
    assert "x.bin: cannot be read: it asks for `os.system`" in outcome.err


def test_names_that_would_move_the_cursor_are_escaped(mptrain, tmp_path):
    torch.save({"\x1b[31mred\n": torch.tensor([1e9, 1.0])}, tmp_path / "x.pt")
    outcome = mptrain("diagnose", tmp_path / "x.pt", "--evidence")
    assert outcome.code == 0
    assert "\x1b" not in outcome.out
    assert "\\x1b[31mred" in outcome.out


def test_on_a_narrow_terminal_no_name_is_cut(foreign, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(console.shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    assert main(["diagnose", str(foreign.path), "--evidence"]) == 0
    lines = terminal.getvalue().splitlines()
    assert (
        "bad: of output, type fp16, max 1, zeros 25.00%, subnormal 50.00%, not finite 3"
        in lines[lines.index("Tensors of step 2") + 1]
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plugin", "x.py"], "has none"),
        (["--replay"], "--replay"),
    ],
)
def test_a_replay_needs_a_run_of_ours(mptrain, foreign, options, said):
    outcome = mptrain("diagnose", foreign.path, *options, "--evidence")
    assert outcome.code == Exit.USAGE
    assert said in outcome.err


def test_a_replay_names_the_module_in_words_and_in_json(mptrain, tmp_path):
    scale = "precision.loss_scale={kind: static, scale: 16777216}"
    run, _ = run_small(tmp_path, "precision.mode=fp16", scale, "train.steps=2")
    outcome = mptrain("diagnose", run.path, "--replay", "--json")
    assert outcome.code == 0
    replayed = outcome.json["evidence"]["replay"]
    assert replayed["step"] == 1
    assert replayed["origin"]["phase"] == "backward"
    assert "; step 1 again: inf made in " in outcome.json["verdict"]
    text = mptrain("diagnose", run.path, "--replay", "--evidence")
    assert "Step 1 again\n" in text.out
    assert "Beside fp32\n" in text.out
    assert outcome.json["verdict"].endswith(text.out.splitlines()[-1].partition(": ")[2])
    assert "comparing step 1" in text.err


def test_a_replay_of_a_checkpoint_is_a_mistake(mptrain, run):
    outcome = mptrain("diagnose", run.path / "checkpoints" / "step-4", "--replay", "--evidence")
    assert outcome.code == Exit.USAGE
    assert "not a run" in outcome.err


def test_a_loop_that_clips_before_it_unscales_is_seen(mptrain, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recorder = Recorder(model, optimizer, scaler, out=tmp_path / "loop")
    for _ in range(3):
        with recorder.step():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(torch.ones(3, 4)).float().square().mean()
            scaler.scale(loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    recorder.close()
    lines = mptrain("diagnose", tmp_path / "loop", "--evidence").out.splitlines()
    (row,) = [line for line in lines if "clip_norm" in line]
    events = row.split(", ")
    clipped = events.index("clip_norm (gradients: scaled")
    assert events.index("forward (autocast fp16)") < clipped
    assert clipped < events.index("unscale (by scaler.step")
    found = mptrain("diagnose", tmp_path / "loop", "--json").json["evidence"]["run"]
    assert [row["step"] for row in found["events"]] == [1]


def test_updates_that_were_lost_come_first(mptrain, foreign):
    lines = mptrain("diagnose", foreign.path, "--evidence").out.splitlines()
    assert not any(line.startswith("Updates") for line in lines)
    run = RunDirectory(foreign.path)
    ratios = {"a": 1e-3, "b": 2e-8, "c": 1e-2}
    run.append_layers([
        layer(3, name, tensor="update", update_ratio=ratio, lost=0.75 if name == "b" else 0.0)
        for name, ratio in ratios.items()
    ])  # fmt: skip
    run.close()
    lines = mptrain("diagnose", foreign.path, "--evidence").out.splitlines()
    table = lines[lines.index("Updates of step 3") + 2 :]
    assert [line.split() for line in table[:3]] == [
        ["b", "2.0e-08", "75.00%"],
        ["a", "1.0e-03", "0"],
        ["c", "1.0e-02", "0"],
    ]


def test_a_batch_that_held_an_infinity_is_named_as_such(mptrain, foreign):
    origin = NonFiniteOrigin(module="", phase="input", value="inf")
    about = FlightRecord(step=3, attempt=1, loss=math.nan, grad_norm=math.nan, scale=8.0,
                         applied=False, origin=origin)  # fmt: skip
    (foreign.flights_path / "step-3").mkdir()
    (foreign.flights_path / "step-3" / "flight.json").write_text(about.to_json())
    lines = mptrain("diagnose", foreign.path, "--evidence").out.splitlines()
    assert any(line.endswith("no       inf in the batch") for line in lines)


def test_a_recorded_loop_has_nothing_to_go_on_with_or_to_evaluate(mptrain, foreign):
    for command in (("run", "--resume"), ("eval",), ("diagnose", "--replay")):
        outcome = mptrain(*command, foreign.path)
        assert outcome.code == Exit.USAGE
        assert "the record of a loop that is not mptrain's" in outcome.err


def test_of_whole_numbers_there_are_no_tables(mptrain, tmp_path):
    safetensors.torch.save_file({"ids": torch.arange(3)}, tmp_path / "x.safetensors")
    out = mptrain("diagnose", tmp_path / "x.safetensors", "--evidence").out
    assert "none that are floating-point numbers" in out
    assert "Layers in fp16" not in out and "cannot hold" not in out


def test_a_layer_of_nan_is_not_said_to_fit(mptrain, tmp_path):
    weights = {"a.w": torch.full((2,), math.nan), "b.w": torch.ones(2)}
    safetensors.torch.save_file(weights, tmp_path / "x.safetensors")
    lines = mptrain("diagnose", tmp_path / "x.safetensors", "--evidence").out.splitlines()
    rows = [line.split() for line in lines[lines.index("Layers in fp16") :]]
    assert {row[0]: row[-1] for row in rows if row and row[0] in "ab"} == {"a": "-", "b": "yes"}


def test_rows_that_cannot_be_read_are_told(mptrain, foreign):
    with (foreign.path / "steps.jsonl").open("ab") as file:
        file.write(b"junk\n{}\n" + b"x" * 200_000 + b"\n" + b'{"step": 4')
    (foreign.path / "layers.jsonl").write_bytes(b"\xff\n")
    outcome = mptrain("diagnose", foreign.path, "--evidence")
    assert outcome.code == 0
    assert "4 rows of steps.jsonl" in outcome.out and "1 rows of layers.jsonl" in outcome.out
    found = mptrain("diagnose", foreign.path, "--json").json
    assert found["evidence"]["run"]["unread"] == {"steps.jsonl": 4, "layers.jsonl": 1}
    assert "of 3 steps skipped; 4 rows of steps.jsonl cannot be read" in found["verdict"]


def test_the_sampled_table_shows_what_it_is_sorted_by(mptrain, foreign):
    rows = [
        layer(3, "subnormal", scale=8.0, subnormal=0.9),
        layer(3, "above", scale=8.0, at_least_65520=0.125, subnormal=0.0),
        layer(3, "tiny", scale=8.0, would_flush=0.375, subnormal=0.0),
    ]
    foreign.append_layers(rows)
    lines = mptrain("diagnose", foreign.path, "--evidence").out.splitlines()
    table = lines[lines.index("Tensors of step 3 (gradients times the scale 8)") + 1 :]
    assert table[0].split("  ")[-1].strip() == "fp16 flushes" and ">= 65520" in table[0]
    assert [row.split()[0] for row in table[1:4]] == ["above", "tiny", "subnormal"]
    assert table[1].split()[-2:] == ["12.50%", "-"]
    assert table[2].split()[-2:] == ["0", "37.50%"]


def test_an_empty_path_is_no_path(mptrain, run, monkeypatch):
    monkeypatch.chdir(run.path)
    outcome = mptrain("diagnose", "")
    assert outcome.code == Exit.USAGE and "the path is empty" in outcome.err


def test_where_a_step_of_ours_went_wrong_a_replay_tells(mptrain, tmp_path):
    scale = "{kind: dynamic, init_scale: 16777216}"
    skipped = f"precision={{mode: fp16, loss_scale: {scale}}}"
    run, _ = run_small(tmp_path, skipped, "train.steps=1")
    lines = mptrain("diagnose", run.path, "--evidence").out.splitlines()
    table = lines[lines.index("Steps that went wrong") :]
    assert table[2].split()[0] == "1" and table[2].endswith("see --replay")


OVERFLOWS = "precision={mode: fp16, loss_scale: {kind: static, scale: 1e30}}"


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> RunDirectory:
    """A run whose recipe is to be repaired."""
    return run_small(tmp_path_factory.mktemp("overflowing"), OVERFLOWS)[0]


def test_the_command_that_is_told_works_without_the_plugin_that_was_not_named(
    mptrain, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run, _ = faulty_run(tmp_path, "mlp", "loss", "none", OVERFLOWS)
    told = mptrain("diagnose", run.path, "--no-replay").err.splitlines()
    assert told[-2] == "to try the fix and write the recipe:"
    program, *command = shlex.split(told[-1])
    assert (program, command[-2:]) == ("mptrain", ["--fix", "fixed.yaml"])
    outcome = mptrain(*command, "--no-replay", "--steps", "1")
    assert (outcome.code, outcome.err.splitlines()[-2]) == (0, "wrote fixed.yaml:")
    assert (tmp_path / "fixed.yaml").is_file()
    outcome = mptrain("diagnose", run.path, "--fix", "again.yaml")
    assert outcome.code == Exit.USAGE and str(run.path / "plugin.py") in outcome.err
    assert not outcome.out  # before the work


def full(path: Path, *_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_where_no_fix_can_be_written_nothing_is_done(mptrain, overflowing, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", full)
    outcome = mptrain("diagnose", overflowing.path, "--fix", tmp_path / "x.yaml")
    assert (outcome.code, outcome.out) == (Exit.STORAGE, "")
    assert "No space left" in outcome.err


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_found_is_told_where_the_fix_is_not_written(
    mptrain, overflowing, tmp_path, monkeypatch, as_json
):
    from mpcli.diagnose import repair

    def late(*given):
        monkeypatch.setattr(Path, "open", full)
        return "text", True

    monkeypatch.setattr(repair, "repaired", late)
    options = ["--no-replay", "--fix", tmp_path / "x.yaml", *(["--json"] if as_json else [])]
    outcome = mptrain("diagnose", overflowing.path, *options)
    assert outcome.code == Exit.STORAGE
    assert "No space left" in outcome.err
    if as_json:
        found = outcome.json
        assert found["findings"][0]["id"] == "scale-too-high"
        assert (found["status"], found["exit_code"], found["fix"]) == ("failed", Exit.STORAGE, None)
        assert "No space left" in found["problems"][0]["message"]
    else:
        assert outcome.out.startswith("error: scale-too-high")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_fix_that_is_torn(mptrain, overflowing, tmp_path, monkeypatch):
    from mpcli.diagnose import repair

    monkeypatch.setattr(repair, "repaired", lambda *given: ("\ud800", True))
    outcome = mptrain("diagnose", overflowing.path, "--no-replay", "--fix", tmp_path / "x.yaml")
    assert outcome.code == Exit.BUG  # what cannot be encoded
    assert not list(tmp_path.iterdir())


def test_on_a_narrow_terminal_the_facts_are_wrapped_and_the_command_is_not(
    overflowing, monkeypatch, capsys
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(findings.shutil, "get_terminal_size", lambda: os.terminal_size((30, 24)))
    monkeypatch.chdir(overflowing.path.parent)
    assert main(["diagnose", overflowing.path.name, "--no-replay"]) == 0
    lines = terminal.getvalue().splitlines()
    facts = next(n for n, line in enumerate(lines) if line.startswith(overflowing.path.name))
    assert len(lines[facts:]) > 1 and all(len(line) <= 30 for line in lines[facts:])
    command = f"mptrain diagnose {overflowing.path.name} --verify --fix fixed.yaml"
    assert capsys.readouterr().err.splitlines()[-1] == command


def test_of_a_run_that_recorded_nothing_nothing_is_said(mptrain, run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(run.recipe_path.read_text())
    outcome = mptrain("diagnose", tmp_path, "--no-replay")
    assert outcome.code == 0
    assert outcome.out.startswith("nothing was recorded\n")
    found = mptrain("diagnose", tmp_path, "--no-replay", "--json").json
    assert found["verdict"].startswith("nothing was recorded; ")
    (tmp_path / "steps.jsonl").write_text("junk\n")
    assert mptrain("diagnose", tmp_path, "--no-replay").out.startswith("no problem found\n")


def test_of_a_checkpoint_the_run_is_named(mptrain, run):
    outcome = mptrain("diagnose", run.path / "checkpoints" / "step-4")
    assert outcome.err == f"its run may say more: mptrain diagnose {run.path}\n"
    assert mptrain("diagnose", run.path / "final").err == ""


@pytest.mark.parametrize(("level", "code"), [("info", 5), ("warning", 0), ("error", 0)])
def test_information_alone_is_below_the_level_of_a_warning(mptrain, tmp_path, level, code):
    safetensors.torch.save_file({"a.w": torch.tensor([1.0, 1e5])}, tmp_path / "x.safetensors")
    outcome = mptrain("diagnose", tmp_path / "x.safetensors", "--fail-on", level, "--json")
    assert [one["severity"] for one in outcome.json["findings"]] == ["info"]
    assert outcome.code == outcome.json["exit_code"] == code


def test_a_fault_reaches_the_level_of_a_warning(mptrain, tmp_path):
    safetensors.torch.save_file({"a.w": torch.tensor([math.nan])}, tmp_path / "x.safetensors")
    outcome = mptrain("diagnose", tmp_path / "x.safetensors", "--fail-on", "warning")
    assert outcome.code == Exit.NUMERICS


def test_a_run_that_stops_says_how_to_find_out_why_and_its_flight_does(mptrain, tmp_path):
    from tests.diagnose.checks.numeric_runs import PLUGIN, RECIPE

    (tmp_path / "odd.yaml").write_text(RECIPE % "overflow")
    out, plugin = tmp_path / "run", ("--plugin", PLUGIN)
    stop = ("--set", "train.on_nonfinite=stop", "--set", "probe.every=0")
    outcome = mptrain("run", tmp_path / "odd.yaml", *plugin, "--output", out, *stop)
    assert outcome.code == Exit.NUMERICS
    last = outcome.err.splitlines()[-1]
    assert last == f"find out why: mptrain diagnose {out} --plugin {PLUGIN}"
    assert "step-1" in [path.name for path in (out / "flights").iterdir()]
    (found,) = mptrain("diagnose", out, *plugin, "--json").json["findings"]
    assert (found["id"], found["layers"], found["step"]) == ("forward-overflow", ["2"], 1)


def test_without_a_plugin_a_run_that_stops_names_its_folder_alone(mptrain, tmp_path, recipe):
    scale = "precision.loss_scale={kind: static, scale: 16777216}"
    stop = ("--set", "train.on_nonfinite=stop", "--set", scale)
    outcome = mptrain("run", recipe, "--output", tmp_path / "run", *stop)
    assert outcome.code == Exit.NUMERICS
    assert outcome.err.splitlines()[-1] == f"find out why: mptrain diagnose {tmp_path / 'run'}"
