"""A disk that is full before or during a run: exit 7, and nothing left to stand in the way."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from mpcli.engines.local import LocalEngine
from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.records import EvalRecord
from mpcli.rundir import RunDirectory
from tests.small import CPU, resume_small, run_small, small_recipe


def create(folder: Path, output: Path | None, **environment: str) -> RunDirectory:
    loaded = small_recipe(folder)
    return RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), environment, output)


@pytest.mark.parametrize("name", ["recipe.source.yaml", "environment.json", "latest"])
def test_a_run_that_cannot_begin_leaves_nothing_behind(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write = RunDirectory._write

    def full(run: RunDirectory, file: str, text: str) -> None:
        if Path(file).name == name:
            raise OSError(28, "No space left on device")
        write(run, file, text)

    monkeypatch.setattr(RunDirectory, "_write", full)
    if name == "latest":
        Path("runs/small/latest").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"cannot write to the run directory runs/small/20"
    ) as caught:
        create(tmp_path, None)
    assert caught.value.exit_code == Exit.STORAGE
    left = [path.name for path in Path("runs/small").iterdir()]
    assert left == (["latest"] if name == "latest" else [])


def test_after_a_full_disk_the_same_output_can_be_used(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_write_attempt", lambda *_: Path("/dev/full").write_text("x"))
        with pytest.raises(UserError, match="No space left on device"):
            create(tmp_path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    create(tmp_path, tmp_path / "out").close()


def test_another_process_that_just_took_the_folder_keeps_its_files(tmp_path, monkeypatch):
    run = create(tmp_path, tmp_path / "out")
    monkeypatch.setattr("mpcli.rundir.empty_folder", lambda output: output)
    with pytest.raises(UserError):
        create(tmp_path, tmp_path / "out")
    assert run.recipe_path.exists()
    run.close()


def test_an_output_that_is_a_dangling_link_is_named_as_such(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="a link to nowhere, which does not exist") as caught:
        create(tmp_path, tmp_path / "link")
    assert caught.value.exit_code == Exit.USAGE


class Unclosable:
    """A file whose last bytes cannot be written."""

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_failing_close_loses_records_and_the_lock_is_given_back(tmp_path):
    run = create(tmp_path, tmp_path / "out")
    run._files = {"x": Unclosable(), **run._files}  # type: ignore[dict-item]
    run.close()
    assert run.lost is not None
    assert run.lost.what == "records were lost: No space left on device"
    RunDirectory.open(tmp_path / "out").close()


def full(*arguments: Any, **options: Any) -> int:
    raise OSError(28, "No space left on device")


class HalfFull:
    """A row file on a disk that takes 10 more bytes, or that has room again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.room = file, 10

    def write(self, data: bytes) -> int:
        if not self.room:
            full()
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_rows_that_have_no_room_are_lost_whole_with_one_warning(tmp_path, caplog):
    run = create(tmp_path, tmp_path / "out")
    path = run.path / "evals.jsonl"
    rows = [EvalRecord(step=n, attempt=1, loss=0.5, ema=False, seconds=1) for n in range(4)]
    run.append_evaluation(rows[0])
    before = path.read_bytes()
    disk = run._files["evals.jsonl"] = HalfFull(run._files["evals.jsonl"])  # type: ignore[assignment]
    for row in rows[1:3]:
        run.append_evaluation(row)
        assert path.read_bytes() == before
    disk.room = 10**6
    run.append_evaluation(rows[3])
    run.close()
    assert path.read_bytes() == before + rows[3].to_json().encode() + b"\n"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert run.lost is not None


def test_training_goes_on_when_only_records_have_no_room(tmp_path, monkeypatch):
    whole, _ = run_small(tmp_path, name="whole")
    append = RunDirectory._append

    def append_to_full(self: RunDirectory, name: str, rows: Any) -> None:
        append(self, name, ())
        with monkeypatch.context() as patch:
            patch.setitem(self._files, name, HalfFull(self._files[name]))
            append(self, name, rows)

    monkeypatch.setattr(RunDirectory, "_append", append_to_full)
    run, result = run_small(tmp_path, "train.steps=4")
    assert (result.status, result.exit_code, result.steps_applied) == ("done", 0, 4)
    assert [p["message"] for p in result.problems] == ["records were lost: No space left on device"]
    assert not (run.path / "steps.jsonl").read_bytes()
    model = "final/model.safetensors"
    assert (run.path / model).read_bytes() == (whole.path / model).read_bytes()


@pytest.mark.slow
def test_a_full_disk_under_tensorboard_is_one_warning(tmp_path):
    pytest.importorskip("tensorboard")
    small_recipe(tmp_path)
    done = subprocess.run(
        [Path(sys.executable).with_name("mptrain"), "run", "small.yaml", "--output", "out",
         "--set", "train.steps=1000", "--set", "output.trackers=[tensorboard]",
         "--set", "output.checkpoint_every=null"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("warning: records were lost: File too large") == 1


def test_an_error_of_the_training_itself_is_no_lost_record(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalEngine, "step", full)
    with pytest.raises(OSError, match="No space left"):
        run_small(tmp_path)
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("output", "new"),
    [
        ("{checkpoint_every: 1 steps, keep_last: 2}", 3),
        ("{checkpoint_every: 1 steps, keep_last: 100}", 4),
        ("{checkpoint_every: 1 steps, keep_last: 2, keep_best: loss}", 4),
        ("{checkpoint_every: 4 steps, keep_last: 2}", 1),
        ("{checkpoint_every: 3 steps, keep_last: 2}", 2),
        ("{checkpoint_every: 1 minutes, keep_last: 2}", 3),
        ("{checkpoint_every: null}", 0),
    ],
)
def test_the_room_that_the_recipe_asks_for_is_checked_before_step_1(
    tmp_path, monkeypatch, output, new
):
    """`new` checkpoints are on the disk at the same time; one byte less is refused."""
    overrides = [f"output={output}", "eval.every=1 steps"]
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=0))
    run, result = run_small(tmp_path, *overrides)
    assert (result.status, result.exit_code, result.steps_attempted) == ("failed", 7, 0)
    (problem,) = result.problems
    numbers = re.fullmatch(
        r"not enough room: (\d+) checkpoints of ([\d,]+) bytes and the trained model need "
        r"([\d,]+) bytes, and 0 are free",
        problem["message"],
    )
    assert numbers
    count, each, needed = (int(number.replace(",", "")) for number in numbers.groups())
    assert count == new
    for short in (1, 0):
        free = needed - short
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: disk_usage(path)._replace(free=free)
        )
        run, result = run_small(tmp_path, *overrides, name=f"{short}")
        assert result.exit_code == (7 if short else 0)
    sizes = [
        sum(f.stat().st_size for f in path.iterdir()) for path in run.checkpoints_path.iterdir()
    ]
    final = (run.path / "final/model.safetensors").stat().st_size
    assert all(size <= each for size in sizes)
    assert new * each <= needed <= new * each + final


def test_a_rollback_needs_room_for_the_beginning_too(tmp_path, monkeypatch):
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=0))
    output = "output={checkpoint_every: 4 steps, keep_last: 2}"
    _, result = run_small(tmp_path, output, "train.on_nonfinite=rollback")
    assert "not enough room: 2 checkpoints of" in result.problems[0]["message"]


def test_checkpoints_that_are_there_need_no_more_room(tmp_path, monkeypatch):
    run, _ = run_small(tmp_path, "output={checkpoint_every: 1 steps, keep_last: 2}")
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=0))
    result = resume_small(run, "train.steps=9")
    assert "not enough room: 1 checkpoints of" in result.problems[0]["message"]


def test_a_folder_that_cannot_be_written_is_found_before_step_1(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    _, result = run_small(tmp_path)
    assert (result.exit_code, result.steps_attempted) == (7, 0)
    assert "cannot write to `checkpoints`" in result.problems[0]["message"]


def test_nothing_in_a_run_directory_names_its_path(tmp_path):
    run, _ = run_small(tmp_path, name="some-peculiar-name")
    texts = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    assert texts
    assert not any(b"some-peculiar-name" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "begun"), [(1_500, False), (12_000, True)])
def test_a_process_that_may_write_no_more_exits_7(tmp_path, limit, begun):
    small_recipe(tmp_path)
    done = subprocess.run(
        [Path(sys.executable).with_name("mptrain"), "run", "small.yaml", "--output", "out-dir",
         "--set", "train.steps=2000", "--json"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},  # a cut-off .pyc would break others
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 7
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    output = tmp_path / "out-dir"
    assert (output / "recipe.yaml").exists() == begun
    if begun:
        result = json.loads((output / "result.json").read_text())
        assert [problem["message"] for problem in result["problems"]] == [
            "cannot write to checkpoint step-89: File too large",  # an epoch's end
            "records were lost: File too large",
        ]
        assert "out-dir" not in (output / "attempts/1/log.rank0.txt").read_text()
