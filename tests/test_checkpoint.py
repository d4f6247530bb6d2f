"""Checkpoints come back as they were saved, and a save leaves all of it or nothing."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mpcli.checkpoint import Checkpoint, load, newest_valid, save
from mpcli.checkpoint.layout import MANIFEST, MAX_JSON_BYTES, STATE, TENSORS
from mpcli.recipe.errors import Exit, UserError
from tests.checkpoints import in_child, small, tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> Checkpoint:
    checkpoint, warnings = newest_valid(folder)
    assert checkpoint is not None
    assert warnings == []
    return checkpoint


def assert_content_of_its_step(checkpoint: Checkpoint) -> None:
    loaded, state = load(checkpoint)
    assert state["applied"] == checkpoint.step
    assert loaded["optimizer.step"].item() == checkpoint.step


def test_tensors_come_back_bit_for_bit(folder):
    saved = tensors()
    checkpoint = save(folder, 7, saved, {}, keep_last=1)
    assert checkpoint == Checkpoint(folder / "step-7", 7)
    loaded, _ = load(checkpoint)
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_nan_keeps_its_bits(folder):
    bits = torch.tensor([0x7FC01234, 0x7F800001 - 2**31, -0x80000000], dtype=torch.int64).int()
    loaded, _ = load(save(folder, 1, {"x": bits.view(torch.float32)}, {}, keep_last=1))
    assert torch.equal(loaded["x"].view(torch.int32), bits)


def test_any_layout_and_shared_memory_can_be_saved(folder):
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tied = torch.nn.Parameter(torch.randn(4, 4))
    saved = {"images": images, "a": tied, "b": tied, "row": tied[1], "turned": tied.T}
    loaded, _ = load(save(folder, 1, saved, {}, keep_last=1))
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    "value",
    [0.1, 5e-324, 1.7976931348623157e308, -0.0, 2**64 - 1, -(2**200), True, None, "ü\n\x1b[31m",
     [], {}, {"a": [1, {"b": 2.5}]}, [0.1 * n for n in range(1000)]],
    ids=repr,
)  # fmt: skip
def test_state_comes_back_exactly(folder, value):
    _, state = load(save(folder, 1, {}, {"value": value}, keep_last=1))
    assert repr(state) == repr({"value": value})


def test_numbers_that_json_lacks_come_back_by_name(folder):
    state = {"values": (float("nan"), float("inf"), -float("inf"))}
    _, loaded = load(save(folder, 1, {}, state, keep_last=1))
    assert loaded == {"values": ["nan", "inf", "-inf"]}
    assert [float(value) for value in loaded["values"]][1:] == [float("inf"), -float("inf")]


@pytest.mark.parametrize(
    "value", [object(), "x" * MAX_JSON_BYTES, "\ud800", json.loads("[" * 250 + "]" * 250)],
    ids=["object", "large", "surrogate", "deep"],
)  # fmt: skip
def test_a_state_that_could_not_be_read_is_not_written(folder, value):
    small(folder)
    with pytest.raises((TypeError, ValueError)):
        small(folder, 6, value=value)
    assert names(folder) == ["step-5"]


def test_the_files_are_those_that_the_manifest_names(folder):
    checkpoint = small(folder)
    assert names(checkpoint.path) == sorted([MANIFEST, TENSORS, STATE])
    manifest = json.loads((checkpoint.path / MANIFEST).read_text())
    assert manifest["step"] == 5
    assert manifest["files"].keys() == {TENSORS, STATE}
    assert str(folder).encode() not in b"".join(p.read_bytes() for p in checkpoint.path.iterdir())


def test_a_copied_folder_is_as_good(folder, tmp_path):
    small(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "checkpoints")
    assert_content_of_its_step(newest(copy))


# Which ones stay


@pytest.mark.parametrize(("keep_last", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_stay(folder, keep_last, left):
    for step in range(1, 6):
        small(folder, step, keep_last)
    assert names(folder) == [f"step-{step}" for step in left]
    assert newest(folder).step == 5


def test_steps_are_ordered_as_numbers(folder):
    for step in (9, 10, 100):
        small(folder, step)
    assert names(folder) == ["step-10", "step-100"]
    assert newest(folder).step == 100


def test_what_is_asked_to_stay_stays(folder):
    small(folder, 1)
    for step in range(2, 6):
        save(folder, step, tensors(step), {"applied": step}, keep_last=1, keep={1, 3})
    assert names(folder) == ["step-1", "step-3", "step-5"]


def test_an_earlier_step_gives_up_the_later_ones(folder):
    for step in (10, 20, 30):
        small(folder, step, keep_last=3)
    small(folder, 15, keep_last=3)
    assert names(folder) == ["step-10", "step-15"]


def test_the_same_step_can_be_saved_again(folder):
    small(folder, 5, note="first")
    small(folder, 5, note="second")
    assert names(folder) == ["step-5"]
    assert load(newest(folder))[1]["note"] == "second"


def test_other_files_beside_the_checkpoints_stay(folder):
    folder.mkdir()
    strange = ["step-", "step-05", "step-5 ", "step-٣", "step-5.tmp.tmp", "best", "notes.tmp"]
    for name in strange:
        (folder / name).mkdir()
    for step in (1, 2, 3):
        small(folder, step, keep_last=1)
    assert newest(folder).step == 3
    assert names(folder) == sorted(["step-3", *strange])


def test_what_cannot_be_removed_is_told_and_does_no_harm(folder, monkeypatch, caplog):
    small(folder, 1)
    monkeypatch.setattr(
        "mpcli.checkpoint.writer.discard",
        lambda path: _fail() if path.exists() else None,
    )
    with caplog.at_level(logging.WARNING):
        small(folder, 2, keep_last=1)
    assert "checkpoint step-1 cannot be removed: Device or resource busy" in caplog.text
    monkeypatch.undo()
    assert newest(folder).step == 2
    assert names(folder) == ["step-2"]


def _fail() -> None:
    raise OSError(16, os.strerror(16))


# Which one is used


def test_without_checkpoints_there_is_none(folder):
    assert newest_valid(folder) == (None, [])
    folder.mkdir()
    (folder / "step-5.tmp").mkdir()
    assert newest_valid(folder) == (None, [])
    assert names(folder) == []


def test_the_newest_valid_one_is_used_with_a_warning(folder):
    for step in (1, 2, 3, 4):
        small(folder, step, keep_last=9)
    (folder / "step-4" / STATE).unlink()
    (folder / "step-3" / TENSORS).write_bytes(b"")
    checkpoint, warnings = newest_valid(folder)
    assert checkpoint == Checkpoint(folder / "step-2", 2)
    assert [warning.severity for warning in warnings] == ["warning"] * 2
    assert warnings[0].what == "checkpoint step-4 cannot be used: state.json is missing"
    assert warnings[1].what.startswith(f"checkpoint step-3 cannot be used: {TENSORS} has 0 bytes")
    assert {warning.hint for warning in warnings} == {"step-2 is used instead"}


def test_if_none_is_valid_every_reason_is_told(folder):
    small(folder, 1)
    small(folder, 2)
    for step in (1, 2):
        (folder / f"step-{step}" / STATE).unlink()
    with pytest.raises(UserError) as caught:
        newest_valid(folder)
    assert caught.value.exit_code == Exit.CHECKPOINT
    assert len(caught.value.problems) == 2
    assert "remove it to start from step 0" in (caught.value.problems[0].hint or "")


def test_a_damaged_later_one_gives_way_when_its_step_comes_again(folder):
    small(folder, 4)
    damaged = small(folder, 5).path / STATE
    damaged.unlink()
    assert newest_valid(folder)[0] == Checkpoint(folder / "step-4", 4)
    small(folder, 5)
    assert_content_of_its_step(newest(folder))
    assert names(folder) == ["step-4", "step-5"]


# Durability


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Names of what is synced, renamed and removed from now on, in order."""
    calls: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def watched_replace(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name))
        replace(source, target)

    def watched_unlink(path: Path, **options: int) -> None:
        unlink(path, **options)
        calls.append(("unlink", Path(path).name))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(os, "unlink", watched_unlink)
    return calls


def test_all_is_on_the_disk_before_it_gets_its_name_and_before_anything_is_removed(
    folder, monkeypatch
):
    small(folder, 1)
    calls = record_calls(monkeypatch)
    small(folder, 2, keep_last=1)
    renamed = calls.index(("rename", "step-2"))
    for name in (TENSORS, STATE, MANIFEST, "step-2.tmp"):
        assert calls.index(("fsync", name)) < renamed, name
    assert calls.index(("fsync", "step-2.tmp")) == renamed - 1
    assert calls[renamed + 1] == ("fsync", "checkpoints")
    assert "unlink" in {call for call, _ in calls[renamed + 2 :]}
    assert "unlink" not in {call for call, _ in calls[: renamed + 2]}


def test_the_folder_itself_is_made_durable(folder, monkeypatch):
    calls = record_calls(monkeypatch)
    small(folder)
    assert calls[0] == ("fsync", folder.parent.name)


@pytest.mark.parametrize("again", [False, True], ids=["next-step", "same-step"])
def test_killed_at_any_system_call_a_valid_checkpoint_is_left(folder, again):
    """`keep_last: 1`, so the one before is removed in the same call."""

    def save_and_die(at: int) -> None:
        calls = 0

        def dying(call):
            def maybe(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == at:
                    os._exit(9)
                return call(*arguments, **options)

            return maybe

        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        small(folder, 5 if again else 6, keep_last=1, note="new")

    small(folder, 5, note="old")
    notes = []
    for at in range(1, 200):
        shutil.rmtree(folder)
        small(folder, 5, note="old")
        status = in_child(lambda at=at: save_and_die(at))
        checkpoint = newest(folder)
        assert_content_of_its_step(checkpoint)
        notes.append(load(checkpoint)[1]["note"])
        assert all(name in ("step-5", "step-6") for name in names(folder))
        if status == 0:
            break
        assert status == 9
    assert at > 10
    assert notes == sorted(notes, reverse=True)  # once new, always new
    assert {*notes} == {"old", "new"}


@pytest.mark.slow
def test_killed_at_random_moments_a_valid_checkpoint_is_left(folder):
    def save_for_ever() -> None:
        for step in range(10**6):
            small(folder, 5 + step // 2, keep_last=1)

    small(folder, 1)
    generator = random.Random(0)
    for _ in range(50):
        child = os.fork()
        if not child:
            try:
                save_for_ever()
            finally:
                os._exit(70)
        time.sleep(generator.uniform(0.001, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert_content_of_its_step(newest(folder))
        assert len(names(folder)) <= 2


# Full disks


@pytest.mark.parametrize("what", ["tensors", "state"])
@pytest.mark.parametrize("step", [5, 6])
def test_no_room_leaves_the_checkpoint_before_intact(folder, what, step):
    def without_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        large = {"large": torch.zeros(10_000)} if what == "tensors" else {}
        state = {"large": "x" * 30_000} if what == "state" else {}
        try:
            save(folder, step, tensors(step) | large, state, keep_last=1)
        except UserError as error:
            assert error.exit_code == Exit.STORAGE
            assert str(error) == f"cannot write to checkpoint step-{step}: File too large"
            os._exit(7)

    small(folder, 5)
    assert in_child(without_room) == 7
    assert names(folder) == ["step-5"]
    assert_content_of_its_step(newest(folder))


@pytest.mark.slow
def test_a_full_file_system_leaves_the_checkpoint_before_intact(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        folder = disk / "checkpoints"
        small(folder, 1)
        for step in (1, 2):
            with pytest.raises(UserError, match="No space left on device") as caught:
                save(folder, step, {"large": torch.zeros(2**18)}, {}, keep_last=1)
            assert caught.value.exit_code == Exit.STORAGE
            assert names(folder) == ["step-1"]
            assert_content_of_its_step(newest(folder))
        small(folder, 2, keep_last=1)
        assert_content_of_its_step(newest(folder))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_during_a_save_is_ctrl_c(folder, monkeypatch):
    small(folder, 1)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(folder, 2, keep_last=1)
    assert names(folder) == ["step-1"]


def test_a_link_in_the_place_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to("elsewhere")
    with pytest.raises(UserError, match="is a link, which is not followed") as caught:
        small(folder)
    assert caught.value.exit_code == Exit.STORAGE
    assert list((tmp_path / "elsewhere").iterdir()) == []


# Other programs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_layout_is_that_of_torch_distributed_checkpoint(folder, tmp_path):
    from torch.distributed import checkpoint as dcp

    saved = tensors()
    ours = save(folder, 1, saved, {}, keep_last=1).path
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
    dcp.save(dict(saved), storage_writer=writer, no_dist=True)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == [TENSORS]
    heads = []
    for path in (ours / TENSORS, tmp_path / "theirs" / TENSORS):
        with safe_open(path, framework="pt") as file:
            metadata = {**file.metadata()}
            metadata["DCP_SHARDING_INFO"] = json.loads(metadata["DCP_SHARDING_INFO"])
            heads.append((metadata, sorted(file.keys())))
    assert heads[0] == heads[1]
    read = {name: torch.empty_like(value) for name, value in saved.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(ours)), no_dist=True)
    assert all(torch.equal(read[name], value) for name, value in saved.items())


@pytest.mark.slow
def test_strace_sees_fsync_before_rename(tmp_path):
    log = tmp_path / "strace"
    program = (
        "from pathlib import Path; from tests.checkpoints import small\n"
        f"small(Path({str(tmp_path)!r}) / 'checkpoints')"
    )
    command = ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2,write",
               "-o", str(log), sys.executable, "-c", program]  # fmt: skip
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not watch: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in log.read_text().splitlines() if "/checkpoints" in line]
    renamed = next(index for index, line in enumerate(lines) if 'step-5") = 0' in line)
    assert "rename" in lines[renamed]
    for name in (f"/{TENSORS}>", f"/{STATE}>", f"/{MANIFEST}>", "step-5.tmp>"):
        synced = [i for i, line in enumerate(lines) if "fsync(" in line and f"{name})" in line]
        assert synced and synced[-1] < renamed, name
        written = [i for i, line in enumerate(lines) if " write(" in line and name in line]
        assert all(index < synced[-1] for index in written), name
    assert any("fsync(" in line and "/checkpoints>)" in line for line in lines[renamed:])
