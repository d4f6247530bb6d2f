"""Checkpoints whose tensors are divided among ranks, which are threads here."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpcli.checkpoint import (
    Checkpoint,
    Part,
    Saver,
    check_room,
    load,
    newest_valid,
    outline,
    writer,
)
from mpcli.checkpoint.layout import (
    MANIFEST,
    SHARDING_INFO,
    STATE,
    TENSORS,
    FileEntry,
    Manifest,
    completed,
    encode,
    sha256,
    shard_name,
)
from mpcli.diagnose.places import gather
from mpcli.engines.local import checkpoint_weights
from mpcli.ranks import Ranks
from mpcli.recipe.errors import Exit, UserError
from mpcli.rundir import RunDirectory
from tests.checkpoints import in_child, small, tensors
from tests.small import resume_small, run_small
from tests.test_checkpoint_hostile import UNDER_AUDIT, refusal

WORLD = 3
SHARDS = [shard_name(rank) for rank in range(WORLD)]
ROWS = {"model.weight": 7, "optimizer.exp_avg.weight": 7, "model.bias": 2, "model.row": 1}


class Threads(Ranks):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, meeting: threading.Barrier) -> None:
        super().__init__(rank, meeting.parties)
        self._meeting = meeting

    def barrier(self) -> None:
        self._meeting.wait(30)


def whole(step: int) -> dict[str, Tensor]:
    """A state, part of which is divided."""
    generator = torch.Generator().manual_seed(step)
    divided = {name: torch.randn(rows, 3, generator=generator) for name, rows in ROWS.items()}
    divided["model.half"] = torch.randn(2, 4, generator=generator).half()
    divided["model.nothing"] = torch.empty(0, 3)
    return divided | {"applied": torch.tensor([step]), "rng.cpu.0": torch.arange(5)}


def share(step: int, rank: int, world_size: int = WORLD) -> dict[str, Tensor | Part]:
    """What a rank holds: rows as torch divides them, so that the last ranks may have none."""
    held: dict[str, Tensor | Part] = {}
    for name, value in whole(step).items():
        if not name.startswith(("model", "optimizer")):
            held[name] = value
            continue
        rows = -(-len(value) // world_size)
        begin = min(rank * rows, len(value))
        block = value[begin : begin + rows].clone()
        held[name] = Part(block, (begin, 0), tuple(value.shape))
    return held


def on_ranks(what: Callable[[Ranks], Any], world_size: int = WORLD) -> list[Any]:
    """What each rank returns; the first exception, by rank, where there is any."""
    meeting = threading.Barrier(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(what, Threads(rank, meeting)) for rank in range(world_size)]
    return [future.result() for future in futures]


def save_steps(
    folder: Path, *steps: int, keep_last: int = 2, background: bool = False, share: Any = share
) -> Checkpoint:
    """Save from every rank, as a run does."""

    def run(ranks: Ranks) -> Checkpoint | None:
        saver = Saver(folder, keep_last, share(0, ranks.rank), ranks, background=background)
        for step in steps:
            held = share(step, ranks.rank)
            saver.save(step, held, {"applied": step})
            for value in held.values() if background else ():  # the training goes on
                (value.tensor if isinstance(value, Part) else value).zero_()
        return saver.finished(wait=True)

    return on_ranks(run)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def assert_is_of_its_step(checkpoint: Checkpoint) -> None:
    loaded, state = load(checkpoint)
    expected = whole(checkpoint.step)
    assert state == {"applied": checkpoint.step}
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("background", [False, True])
def test_what_ranks_hold_comes_back_whole(folder, background):
    checkpoint = save_steps(folder, 1, 2, 3, background=background)
    assert checkpoint == Checkpoint(folder / "step-3", 3)
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-3"]
    names = sorted(path.name for path in checkpoint.path.iterdir())
    assert names == sorted([*SHARDS, STATE, MANIFEST])
    for step in (2, 3):
        assert_is_of_its_step(Checkpoint(folder / f"step-{step}", step))
    assert newest_valid(folder) == (checkpoint, [])


def test_each_rank_writes_what_it_has_elements_of(folder):
    checkpoint = save_steps(folder, 1)
    held = {}
    for name in SHARDS:
        with safe_open(checkpoint.path / name, framework="pt") as file:
            held[name] = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert held[SHARDS[1]] == {
        "model.weight": [3, 3], "optimizer.exp_avg.weight": [3, 3],
        "model.bias": [1, 3], "model.half": [1, 4],
    }  # fmt: skip
    assert held[SHARDS[2]] == {"model.weight": [1, 3], "optimizer.exp_avg.weight": [1, 3]}
    assert held[SHARDS[0]].keys() == whole(1).keys()


def test_blocks_of_any_grid_come_back(folder):
    """Two dimensions, unevenly cut."""
    value = torch.arange(35.0).view(5, 7)
    cuts = [(slice(0, 4), slice(0, 3)), (slice(0, 4), slice(3, 7)), (slice(4, 5), slice(0, 7))]

    def blocks(step: int, rank: int) -> dict[str, Part]:
        rows, columns = cuts[rank]
        return {"x": Part(value[rows, columns], (rows.start, columns.start), (5, 7))}

    loaded, _ = load(save_steps(folder, 1, share=blocks))
    assert torch.equal(loaded["x"], value)


def test_what_is_whole_is_written_by_rank_0_alone_as_by_a_run_of_one(folder, tmp_path):
    def run(ranks: Ranks) -> Checkpoint | None:
        saver = Saver(folder, 2, tensors(5), ranks, background=True)
        assert ranks.is_main or saver._copies is None
        saver.save(5, tensors(5), {"applied": 5})
        return saver.finished(wait=True)

    checkpoint, *others = on_ranks(run)
    assert others == [None, None]
    assert content(checkpoint.path) == content(small(tmp_path / "alone").path)


def content(folder: Path) -> dict[str, Any]:
    """Of the files, but for the order of metadata, which safetensors leaves to chance."""
    assert {path.name for path in folder.iterdir()} == {TENSORS, STATE, MANIFEST}
    file = (folder / TENSORS).read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    return {"header": header, "data": file[end:], "state": (folder / STATE).read_bytes()}


def test_one_rank_that_holds_everything_writes_what_a_run_of_one_does(folder, tmp_path):
    held = {name: Part.whole(tensor) for name, tensor in tensors(5).items()}
    saver = Saver(folder, 2, held, background=False)
    saver.save(5, held, {"applied": 5})
    assert content(folder / "step-5") == content(small(tmp_path / "alone").path)


def test_copies_are_of_what_the_rank_writes(folder):
    savers = [
        Saver(folder, 2, share(0, rank), Ranks(rank, WORLD), background=True)
        for rank in range(WORLD)
    ]
    for rank, saver in enumerate(savers):
        assert saver._copies is not None
        assert ("applied" in saver._copies) == (rank == 0)
    assert {name: tuple(t.shape) for name, t in savers[2]._copies.items()} == {
        "model.weight": (1, 3), "optimizer.exp_avg.weight": (1, 3)
    }  # fmt: skip


def test_room_is_for_whole_tensors(folder, monkeypatch):
    part = {"x": Part(torch.zeros(1, 1000), (0, 0), (1000, 1000))}
    usage = shutil._ntuple_diskusage(10**9, 0, 3_999_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder.parent.mkdir(exist_ok=True)
    with pytest.raises(UserError, match="not enough room"):
        check_room(folder, part, Ranks(0, 2), saves=1, keep=2, final_bytes=0)
    usage = shutil._ntuple_diskusage(10**9, 0, 4_200_000)
    check_room(folder, part, Ranks(0, 2), saves=1, keep=2, final_bytes=0)


def test_a_tensor_is_read_when_it_is_asked_for(folder):
    loaded, _ = load(save_steps(folder, 1))
    about = outline(loaded, "model.weight")
    assert (about.shape, about.dtype, about.device.type) == ((7, 3), torch.float32, "meta")
    assert "model.weight" in loaded
    assert "model.other" not in loaded
    with pytest.raises(KeyError):
        loaded["model.other"]
    assert len(loaded) == len(whole(1))
    first = loaded["model.weight"]
    first.zero_()
    assert torch.equal(loaded["model.weight"], whole(1)["model.weight"])


def divide(checkpoint: Checkpoint) -> None:
    """Replace a checkpoint of one file by the same one in several."""
    tensors, state = load(checkpoint)

    def blocks(rank: int) -> dict[str, Tensor | Part]:
        held: dict[str, Tensor | Part] = {}
        for name, value in tensors.items():
            held[name] = value
            if value.dim() and not name.startswith("rng."):
                chunks = value.tensor_split(WORLD)
                offset = sum(map(len, chunks[:rank]))
                offsets = (offset, *[0] * (value.dim() - 1))
                held[name] = Part(chunks[rank], offsets, tuple(value.shape))
        return held

    def run(ranks: Ranks) -> None:
        held = blocks(ranks.rank)
        saver = Saver(checkpoint.path.parent, 9, held, ranks, background=False)
        saver.save(checkpoint.step, held, state)

    on_ranks(run)


@pytest.mark.parametrize("adam", [False, True])
def test_a_run_of_one_process_goes_on_from_what_many_saved(tmp_path, adam):
    options = ["output.checkpoint_every=2 steps", "train.ema=0.9"]
    options += ["optim={kind: adamw, lr: 0.01}"] if adam else []
    run, _ = run_small(tmp_path, *options)
    divided = RunDirectory.read(shutil.copytree(run.path, tmp_path / "divided"))
    for checkpoint in completed(divided.checkpoints_path):
        divide(checkpoint)
        assert (checkpoint.path / SHARDS[2]).is_file()
        same = run.checkpoints_path / checkpoint.path.name
        read, expected = load(checkpoint)[0], load(Checkpoint(same, checkpoint.step))[0]
        theirs, ours = (checkpoint_weights(each, 0.9) for each in (read, expected))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
        found, facts = gather(checkpoint.path).facts, gather(same).facts
        assert found is not None
        assert found.weights.tensors == facts.weights.tensors
        assert found.optimizer == facts.optimizer
        assert found.scaler == facts.scaler
    for each in (run, divided):
        assert resume_small(each, "train.steps=6").status == "done"
    model = "final/model.safetensors"
    ours, theirs = (load_file(each.path / model) for each in (run, divided))
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    run, _ = run_small(tmp_path, "output.checkpoint_every=2 steps")
    other, _ = run_small(tmp_path, "task.model.width=6", name="other")
    shutil.rmtree(run.checkpoints_path / "step-4")
    shutil.move(other.checkpoints_path / "step-4", run.checkpoints_path)
    divide(Checkpoint(run.checkpoints_path / "step-4", 4))
    result = resume_small(run, "train.steps=6")
    assert result.status == "done"
    assert "step-4 cannot be used: it is not of this run" in result.problems[0]["message"]


# Failures


def test_a_rank_that_cannot_write_fails_the_save_at_once(folder, monkeypatch):
    save_steps(folder, 1)
    write = writer._write_tensors

    def full(path: Path, *arguments: Any) -> None:
        if path.name == SHARDS[2]:
            raise OSError(28, "No space left on device")
        write(path, *arguments)

    monkeypatch.setattr(writer, "_write_tensors", full)
    errors: dict[int, UserError | None] = dict.fromkeys(range(WORLD))

    def run(ranks: Ranks) -> None:
        saver = Saver(folder, 2, share(0, ranks.rank), ranks, background=True)
        saver.save(2, share(2, ranks.rank), {})
        try:
            saver.finished(wait=True)
        except UserError as error:
            errors[ranks.rank] = error

    on_ranks(run)
    assert errors[1] is None
    assert [errors[rank].exit_code for rank in (0, 2)] == [Exit.DISTRIBUTED, Exit.STORAGE]
    assert str(errors[0]).startswith("rank 2 cannot write its part of checkpoint step-2")
    assert "No space left on device" in str(errors[2])
    assert [path.name for path in folder.iterdir()] == ["step-1"]


def test_rank_0_gives_up_waiting(folder):
    writer.begin(folder, 1)
    with pytest.raises(UserError, match="rank 1 has not written its part") as caught:
        writer.save(folder, 1, share(1, 0), {}, keep_last=1, writers=WORLD, patience=0.1)
    assert caught.value.exit_code == Exit.DISTRIBUTED
    assert list(folder.iterdir()) == []


def test_ranks_that_are_lost_are_not_waited_for(folder, monkeypatch):
    ranks = Ranks(0, WORLD)
    monkeypatch.setattr(ranks, "barrier", lambda: None)
    saver = Saver(folder, 2, share(0, 0), ranks, background=True)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="gloo"), saver:
        saver.save(1, share(1, 0), {})
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:545] Connection closed by peer")
    assert time.monotonic() - began < ranks.timeout / 2
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("victim", ["fsync", "replace", "unlink"])
def test_killed_at_any_moment_a_valid_checkpoint_is_left(folder, victim):
    """All ranks are one process here: they die together, as a group does."""
    # Made before the fork: torch computes in one thread of a forked process, and in no others.
    held = {(step, rank): share(step, rank) for step in (0, 2) for rank in range(WORLD)}
    at = 0
    while True:
        at += 1
        save_steps(folder, 1, keep_last=1)

        def dying(at: int = at) -> None:
            calls, lock, call = 0, threading.Lock(), getattr(os, victim)

            def maybe(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                with lock:
                    calls += 1
                    if calls == at:
                        os._exit(9)
                return call(*arguments, **options)

            setattr(os, victim, maybe)
            save_steps(folder, 2, keep_last=1, share=lambda step, rank: held[step, rank])

        status = in_child(dying)
        found, warnings = newest_valid(folder)
        assert found is not None
        assert warnings == []
        assert_is_of_its_step(found)
        assert {path.name for path in folder.iterdir()} <= {"step-1", "step-2"}
        if status == 0:
            break
        assert status == 9
    assert at > 3
    assert found.step == 2


# Other programs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_it(folder):
    from torch.distributed import checkpoint as dcp

    ours = save_steps(folder, 1).path
    read = {name: torch.empty_like(value) for name, value in whole(1).items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(ours)), no_dist=True)
    for name, value in whole(1).items():
        assert torch.equal(read[name], value), name


def test_files_are_named_as_torch_names_them():
    from torch.distributed.checkpoint._hf_utils import _gen_file_name

    for rank in (0, 1, 9_999):
        assert shard_name(rank) == _gen_file_name(1, 1, rank + 1)


# Malice


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return save_steps(folder, 5)


def reseal(folder: Path, count: int = WORLD) -> None:
    names = [*map(shard_name, range(count)), STATE]
    files = {
        name: FileEntry(size=(folder / name).stat().st_size, sha256=sha256(folder / name))
        for name in names
    }
    manifest = Manifest(version=1, step=5, files=files)
    (folder / MANIFEST).write_bytes(encode(manifest.model_dump()))


def rewritten(change: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The second file, with other tensors or places; what `change` returns are the metadata."""

    def attack(folder: Path) -> None:
        path = folder / SHARDS[1]
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        places = json.loads(metadata[SHARDING_INFO])
        text = change(held, places)
        info = json.dumps(places) if text is None else text
        save_file(held, path, {} if text == "none" else metadata | {SHARDING_INFO: info})
        reseal(folder)

    return attack


def place(name: str = "model.weight", **changed: Any) -> Callable[[Path], None]:
    return rewritten(lambda held, places: places[name].update(changed))


def tensor(name: str, value: Tensor, **placed: Any) -> Callable[[Path], None]:
    def change(held: dict[str, Tensor], places: dict[str, Any]) -> None:
        held[name] = value
        places[name] = places.get(name, {}) | placed

    return rewritten(change)


def without(name: str) -> Callable[[Path], None]:
    def change(held: dict[str, Tensor], places: dict[str, Any]) -> None:
        del held[name], places[name]

    return rewritten(change)


def text(info: str) -> Callable[[Path], None]:
    return rewritten(lambda held, places: info)


def missing_file(folder: Path) -> None:
    (folder / SHARDS[2]).unlink()


def fewer_files(folder: Path) -> None:
    (folder / SHARDS[2]).unlink()
    reseal(folder, 2)


def file_more(folder: Path) -> None:
    (folder / shard_name(WORLD)).write_bytes((folder / SHARDS[2]).read_bytes())


def file_doubled(folder: Path) -> None:
    file_more(folder)
    reseal(folder, WORLD + 1)


def gap_in_numbers(folder: Path) -> None:
    (folder / SHARDS[2]).rename(folder / shard_name(7))


def exchanged(folder: Path) -> None:
    (folder / SHARDS[1]).rename(folder / "kept")
    (folder / SHARDS[2]).rename(folder / SHARDS[1])
    (folder / "kept").rename(folder / SHARDS[2])


def link(folder: Path) -> None:
    (folder / SHARDS[1]).rename(folder.parent / "moved")
    (folder / SHARDS[1]).symlink_to("../moved")


def sparse(folder: Path) -> None:
    os.truncate(folder / SHARDS[1], 2**40)
    value = json.loads((folder / MANIFEST).read_text())
    value["files"][SHARDS[1]]["size"] = 2**40
    (folder / MANIFEST).write_bytes(encode(value))


def sparse_tensor(folder: Path) -> None:
    """A header that fits a file of a terabyte, of a tensor that is not of the checkpoint."""
    header = {"big": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}
    header |= {"__metadata__": {SHARDING_INFO: '{"big":{"saved_offsets":[0],"shape":[9]}}'}}
    content = json.dumps(header).encode()
    with (folder / SHARDS[1]).open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + 2**40)
    value = json.loads((folder / MANIFEST).read_text())
    value["files"][SHARDS[1]]["size"] = 8 + len(content) + 2**40
    (folder / MANIFEST).write_bytes(encode(value))


def entry_left(folder: Path) -> None:
    (folder / "entry-00001.json").write_bytes(b"{}")


ATTACKS: dict[str, Callable[[Path], None]] = {
    "a file is missing": missing_file,
    "a file is missing and the manifest knows": fewer_files,
    "a file more": file_more,
    "a file twice": file_doubled,
    "a file with a later number": gap_in_numbers,
    "files exchanged": exchanged,
    "a link": link,
    "a terabyte of nothing": sparse,
    "a terabyte of nothing in a tensor": sparse_tensor,
    "an entry left": entry_left,
    "offsets negative": place(saved_offsets=[-3, 0]),
    "offsets overlap": place(saved_offsets=[2, 0]),
    "offsets leave a hole": place(saved_offsets=[4, 0]),
    "offsets outside": place(saved_offsets=[2**62, 0]),
    "offsets beyond 64 bits": place(saved_offsets=[10**30, 0]),
    "offsets of another rank": place(saved_offsets=[0, 0]),
    "offsets of too few dimensions": place(saved_offsets=[3]),
    "offsets of too many dimensions": place(saved_offsets=[3, 0, 0]),
    "offsets are text": place(saved_offsets="30"),
    "offsets are floats": place(saved_offsets=[3.0, 0.0]),
    "offsets are true": place(saved_offsets=[True, False]),
    "offsets are missing": rewritten(lambda held, places: places.update({"model.weight": {}})),
    "a place says more": place(more=1),
    "shapes disagree": place(shape=[8, 3]),
    "shape of terabytes": place(shape=[2**40, 3]),
    "shape beyond 64 bits": place(shape=[10**40, 3]),
    "shape of other dimensions": place(shape=[21]),
    "shape is missing": place(shape=None),
    "a whole twice": tensor("applied", torch.tensor([5]), saved_offsets=[0]),
    "a part of terabytes of nothing": tensor(
        "x", torch.zeros(1), saved_offsets=[0], shape=[2**45]
    ),
    "a part of a whole that is empty": tensor("x", torch.zeros(1), saved_offsets=[0], shape=[0]),
    "an empty part": tensor("model.row", torch.zeros(0, 3), saved_offsets=[1, 0], shape=[1, 3]),
    "many dimensions": tensor(
        "x", torch.zeros([1] * 64), saved_offsets=[0] * 5000, shape=[1] * 5000
    ),
    "another type": tensor("model.weight", torch.zeros(3, 3).half()),
    "another type of the same size": tensor("model.weight", torch.zeros(3, 3).int()),
    "another size": tensor("model.weight", torch.zeros(2, 3)),
    "a part is missing": without("model.bias"),
    "a place is missing": rewritten(lambda held, places: places.pop("model.bias") and None),
    "a place of nothing": rewritten(
        lambda held, places: places.update({"x": {"saved_offsets": [0]}})
    ),
    "no metadata": text("none"),
    "places are not JSON": text("\x80\x04K\x01."),
    "places are empty": text(""),
    "places are a list": text("[]"),
    "places are deep": text('{"a":' * 10**5 + "1" + "}" * 10**5),
    "places are wide": text('{"model.weight":[' + "[]," * 10**6 + "[]]}"),
    "offsets are wide": text('{"model.weight":{"saved_offsets":[' + "0," * 10**6 + "0]}}"),
    "places are huge": text(" " * 2**23),
    "a huge number": text('{"model.weight":{"saved_offsets":[' + "9" * 10**6 + "]}}"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_checkpoint_is_refused(checkpoint, attack):
    ATTACKS[attack](checkpoint.path)
    refusal(checkpoint)


@pytest.mark.slow
def test_reading_executes_nothing(tmp_path):
    """Every attack and the good one, in a process whose audit hook raises at what is forbidden."""
    cases = []
    for number, attack in enumerate([lambda folder: None, lambda folder: None, *ATTACKS.values()]):
        folder = tmp_path / str(number) / "checkpoints"
        folder.parent.mkdir()
        attack(save_steps(folder, 5).path)
        cases.append(folder)
    done = subprocess.run(
        [sys.executable, "-c", UNDER_AUDIT], input="\n".join(map(str, cases)),
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2 [] []"


@pytest.mark.parametrize("name", SHARDS)
def test_truncated_and_lengthened_files_are_refused(checkpoint, name):
    path = checkpoint.path / name
    content = path.read_bytes()
    for changed in (content[:-1], content[:9], b"", content + b"\0"):
        path.write_bytes(changed)
        assert name in refusal(checkpoint)
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert "was changed" in refusal(checkpoint)
    path.write_bytes(content)
    assert_is_of_its_step(checkpoint)


def test_a_manifest_of_many_files_may_be_longer(folder, monkeypatch):
    monkeypatch.setattr("mpcli.checkpoint.reader.MAX_JSON_BYTES", 500)
    count = 40

    def one_row(rank: int) -> dict[str, Part]:
        return {"x": Part(torch.tensor([float(rank)]), (rank,), (count,))}

    writer.begin(folder, 1)
    for rank in range(1, count):
        writer.save_share(folder, 1, one_row(rank), rank)
    checkpoint = writer.save(folder, 1, one_row(0), {}, keep_last=1, writers=count)
    loaded, _ = load(checkpoint)
    assert torch.equal(loaded["x"], torch.arange(float(count)))
