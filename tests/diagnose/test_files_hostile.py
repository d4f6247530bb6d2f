"""Damaged and malicious files: exit 4 (2 where nothing says that it is a checkpoint), at once,
within bounds of memory, and nothing executes."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mpcli.diagnose.places import gather
from mpcli.diagnose.reading import MAX_JSON_BYTES
from mpcli.recipe.errors import Exit, UserError
from tests.checkpoints import in_child, small

SECONDS = 10.0  # of CPU time: what the longest allowed pickle takes, on a busy machine
GIBIBYTES = 2.5  # of memory, beside what the process has


class Calls:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def bombs(trace: Path) -> dict[str, object]:
    """Values whose loading would leave a trace."""
    return {
        "os.system": Calls(os.system, f"touch {trace}"),
        "eval": Calls(eval, f"open({str(trace)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(trace)!r}, 'w')"),
        "open": Calls(open, str(trace), "w"),
        "mkdir": Calls(os.mkdir, str(trace)),
        "getattr": Calls(getattr, "x", "upper"),
        "torch.load": Calls(torch.load, str(trace)),
        "torch.hub": Calls(torch.hub.load, str(trace), "x"),
        "in a tensor's place": {"weight": torch.ones(2), "other": Calls(os.mkdir, str(trace))},
        "in an optimizer": {"state": {0: {"x": Calls(os.mkdir, str(trace))}}, "param_groups": []},
    }


BOMBS = tuple(bombs(Path()))
SAVERS: dict[str, Callable[[object, Path], None]] = {
    "torch.save": lambda value, path: torch.save(value, path),
    "torch.save of old": lambda value, path: torch.save(
        value, path, _use_new_zipfile_serialization=False
    ),
    "pickle 2": lambda value, path: path.write_bytes(pickle.dumps(value, 2)) and None,
    "pickle 5": lambda value, path: path.write_bytes(pickle.dumps(value, 5)) and None,
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def refused(path: Path, *, exit_code: Exit = Exit.CHECKPOINT) -> str:
    """What is said of a path that must be refused at once."""
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        gather(path)
    assert caught.value.exit_code == exit_code, caught.value
    assert time.process_time() - started < SECONDS
    (problem,) = caught.value.problems
    assert len(problem.what) < 800
    return problem.what


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_calls_is_refused_and_calls_nothing(tmp_path, trace, bomb, save):
    for number, name in enumerate(("x.pt", "x.bin", "x.pth", "checkpoint-1/optimizer.pt")):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        SAVERS[save](bombs(trace)[bomb], path)
        refused(path)
    refused(path.parent)  # the folder with an evil `optimizer.pt`
    assert not trace.exists()


def test_the_bombs_work_where_somebody_is_careless(trace):
    """Or the test above shows nothing."""
    pickle.loads(pickle.dumps(bombs(trace)["os.system"]))
    assert trace.exists()


def test_what_code_is_asked_for_is_named(tmp_path, trace):
    torch.save(bombs(trace)["os.system"], tmp_path / "x.pt")
    said = refused(tmp_path / "x.pt")
    assert said.endswith("it asks for `posix.system`, which is code and not data")


@pytest.mark.parametrize("name", ["training_args.bin", "rng_state.pth", "scheduler.pt"])
def test_evil_files_that_are_not_read_do_no_harm(tmp_path, trace, name):
    torch.save(bombs(trace)["os.system"], tmp_path / name)
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    found = gather(tmp_path).facts
    assert [left.file for left in found.not_read] == [name]
    assert not trace.exists()


# Pickles that work for a long time or ask for much memory


def archive(path: Path, data: bytes, *more: tuple[str, bytes], kind: int = 0) -> None:
    """A file as `torch.save` makes it, around any pickle."""
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("x/data.pkl", data)
        file.writestr("x/version", b"3\n")
        for name, content in more:
            file.writestr(name, content)


def opcodes(*parts: bytes | str) -> bytes:
    return b"\x80\x02" + b"".join(p if isinstance(p, bytes) else p.encode() for p in parts) + b"."


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    text = pickle.encode_long(value)
    return b"\x8a" + bytes([len(text)]) + text


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


HEX = text("a")
for _ in range(60):
    HEX = call("_codecs", "encode", HEX, text("hex"))
NESTED = b"]" * 100_000 + b"a" * 99_999
WIDE = b"]" + b"]a" * (2**23)
LAUGHS = b"]" + b"".join(b"q\0](h\0h\0e" for _ in range(60))  # each list twice in the next
PICKLES = {
    "a bytearray of a terabyte": call("__builtin__", "bytearray", number(2**40)),
    "a storage of a terabyte": call("torch.storage", "UntypedStorage", number(2**40)),
    "a tensor of a terabyte": call("torch", "FloatTensor", number(2**40)),
    "a text that doubles": HEX,
    "nested": NESTED,
    "wide": WIDE,
    "a billion laughs": LAUGHS,
    "an endless push and pop": b"N0" * (2**22) + b"N",
    "a module": b"cos\n",
    "no end": b"N",
    "an unknown opcode": b"\xff",
}


@pytest.mark.parametrize("kind", [".pt", ".old.pt"])
@pytest.mark.parametrize("name", [name for name in PICKLES if name != "a billion laughs"])
def test_a_pickle_cannot_work_or_allocate_without_bounds(tmp_path, name, kind):
    path = tmp_path / f"x{kind}"
    data = opcodes(PICKLES[name])
    if name == "no end":
        data = data[:-1]
    if kind == ".pt":
        archive(path, data)
    else:
        path.write_bytes(old(data))
    within_memory(lambda: refused(path))


def old(data: bytes) -> bytes:
    """A file as torch before 1.6 made it, around any pickle."""
    buffer = io.BytesIO()
    torch.save(None, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    begin = whole.rindex(b"\x80\x02N.")
    return whole[:begin] + data + whole[begin + 4 :]


def test_the_old_format_is_made_right(tmp_path):
    (tmp_path / "x.pt").write_bytes(old(pickle.dumps({"a": 1}, 2)))
    assert gather(tmp_path / "x.pt").facts.weights is None


def test_containers_in_containers_are_walked_once(tmp_path):
    archive(tmp_path / "x.pt", opcodes(PICKLES["a billion laughs"]))
    with pytest.raises(UserError, match="nested too deep"):
        gather(tmp_path / "x.pt")


def within_memory(read: Callable[[], object]) -> None:
    """Run in a child, whose greatest memory is looked at."""

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read()
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert more < GIBIBYTES * 2**20, f"{more} KiB"

    assert in_child(child) == 0


# Random damage


def damaged(content: bytes, generator: random.Random) -> bytes:
    """A few bits flipped, bytes that mean something to a pickle, pieces lost or repeated."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 5, 20))):
        place = generator.randrange(len(data))
        match generator.randrange(4):
            case 0:
                data[place] ^= 1 << generator.randrange(8)
            case 1:
                data[place] = generator.choice(b"(.]}tRcq\x80\x85\x8a0NKJX")
            case 2:
                del data[place : place + generator.randrange(20)]
            case _:
                data[place:place] = data[generator.randrange(len(data)) :][:40]
    return bytes(data)


@pytest.mark.parametrize("suffix", [".pt", ".old.pt", ".safetensors"])
def test_random_damage_is_refused_or_gives_other_numbers(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    weights = {"a.w": torch.ones(3, 2), "b.w": torch.ones(4).half()}
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=suffix == ".pt")
    whole, generator, refusals = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        path.write_bytes(damaged(whole, generator))
        try:
            gather(path)
        except UserError as error:
            assert error.exit_code == Exit.CHECKPOINT
            refusals += 1
    assert refusals > 50


# Archives that lie


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def repacked(
    path: Path, change: Callable[[str, bytes], bytes], kind: int = 0, without: str = "nothing"
) -> None:
    """The archive of a tensor of four numbers, with other contents."""
    source = zipfile.ZipFile(io.BytesIO(torch_bytes({"x": torch.ones(4)})))
    with zipfile.ZipFile(path, "w", kind) as file:
        for name in source.namelist():
            if name.endswith(without):
                continue
            file.writestr(name, change(name, source.read(name)))


def bigger(name: str, content: bytes) -> bytes:
    """Four numbers become 2^30."""
    if not name.endswith("data.pkl"):
        return content
    return content.replace(b"K\x04t", b"J" + struct.pack("<i", 2**30) + b"t").replace(
        b"K\x04\x85", b"J" + struct.pack("<i", 2**30) + b"\x85"
    )


def test_a_compressed_archive_is_refused(tmp_path):
    archive(tmp_path / "x.pt", bytes(10**8), kind=zipfile.ZIP_DEFLATED)
    assert "its archive is compressed" in refused(tmp_path / "x.pt")
    repacked(tmp_path / "y.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert "its archive is compressed" in refused(tmp_path / "y.pt")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    repacked(tmp_path / "x.pt", bigger)
    within_memory(lambda: refused(tmp_path / "x.pt"))


def test_a_storage_that_is_missing_is_refused(tmp_path):
    repacked(tmp_path / "x.pt", lambda name, content: content, without="/data/0")
    refused(tmp_path / "x.pt")


def test_an_archive_with_a_file_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(tmp_path / "x.pt", opcodes("N"), ("x/data.pkl", b"\x80\x02cos\nsystem\n."))
    refused(tmp_path / "x.pt")


def test_many_views_of_the_same_memory_are_refused(tmp_path):
    base = torch.zeros(2**20)
    torch.save({f"{i}": base[i:] for i in range(1000)}, tmp_path / "x.pt")
    assert "the same memory again and again" in refused(tmp_path / "x.pt")
    overlapping = torch.zeros(2**21).as_strided((2**20, 2**20), (1, 1))
    torch.save({"x": overlapping}, tmp_path / "y.pt")
    assert "the same memory again and again" in refused(tmp_path / "y.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = (tmp_path / "x").with_suffix(suffix)
    values = {f"layer.{number}": torch.ones(100) for number in range(4)}
    whole = torch_bytes(values) if suffix == ".pt" else safetensors.torch.save(values)
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        refused(path)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\0" * 64, b"\xff" * 64, b"PK\x03\x04", b"<html>", b"\x80\x02."]
)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, suffix, content):
    path = (tmp_path / "x").with_suffix(suffix)
    path.write_bytes(content)
    refused(path)


# safetensors


def tensor_file(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if size is None else size).to_bytes(8, "little") + encoded + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32",' \
        b'"shape":[2],"data_offsets":[0,8]}}'  # fmt: skip
SAFETENSORS = {
    "header says 2^63": tensor_file({}, size=2**63),
    "header says more than there is": tensor_file({}, size=3),
    "header is long": tensor_file(b"{" + b" " * 2**24 + b"}"),
    "header is deep": tensor_file(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "header is a list": tensor_file(b"[]"),
    "header is a pickle": tensor_file(b"\x80\x04K\x01."),
    "header is not UTF-8": tensor_file(b'{"\xff": 1}'),
    "header has NaN": tensor_file(b'{"a": NaN}'),
    "header has a huge number": tensor_file(b'{"a": ' + b"9" * 10**6 + b"}"),
    "header has a key twice": tensor_file(TWICE, bytes(8)),
    "offsets overlap": tensor_file({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "offsets leave a gap": tensor_file({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "offsets run backwards": tensor_file({"a": entry(8, 0, [2])}, bytes(8)),
    "offsets run past the end": tensor_file({"a": entry(0, 2**40, [2**38])}, bytes(8)),
    "offsets are negative": tensor_file({"a": entry(-8, 0, [2])}, bytes(8)),
    "data that no tensor has": tensor_file({"a": entry(0, 4, [1])}, bytes(64)),
    "shape is larger than its data": tensor_file({"a": entry(0, 4, [2**30])}, bytes(4)),
    "shape overflows": tensor_file({"a": entry(0, 4, [2**62, 4, 1])}, bytes(4)),
    "type is unknown": tensor_file({"a": entry(0, 4, [1], "PICKLE")}, bytes(4)),
    "many tensors in one place": tensor_file(
        {f"{i}": entry(0, 8, [2]) for i in range(50_000)}, bytes(8)
    ),
}


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_a_lying_header_is_refused(tmp_path, attack):
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAFETENSORS[attack])
    refused(path)
    path.rename(tmp_path / "model.safetensors")
    refused(tmp_path)


# Folders


def hub(folder: Path) -> Path:
    safetensors.torch.save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    return folder


def written(name: str, content: bytes | str | object) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        hub(folder)
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(encoded)

    return attack


def index(*files: object) -> Callable[[Path], None]:
    weight_map = {f"w{number}": file for number, file in enumerate(files)}
    return written("model.safetensors.index.json", {"weight_map": weight_map})


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        hub(folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return attack


STATE, INDEX, MODEL = "trainer_state.json", "model.safetensors.index.json", "model.safetensors"
DEEP = b"[" * 10**6 + b"]" * 10**6
FOLDERS: dict[str, Callable[[Path], None]] = {
    "index leads up": index("../../secret.safetensors"),
    "index leads to the root": index("/secret.safetensors"),
    "index leads down": index("a/../model.safetensors"),
    "index leads up the other way": index("..\\secret.safetensors"),
    "index names a pickle of arguments": index("training_args.bin"),
    "index names the folder": index("."),
    "index names what is not there": index("x.safetensors"),
    "index names a number": index(5),
    "index names a list": index([["model.safetensors"]]),
    "index names a zero byte": index("a\0.safetensors"),
    "index names a tensor that no file has": index("model.safetensors"),
    "index has no map": written(INDEX, {}),
    "index is a list": written(INDEX, []),
    "index is deep": written(INDEX, DEEP),
    "index is not UTF-8": written(INDEX, b'{"weight_map": {"\xff": "x"}}'),
    "index has a key twice": written(INDEX, b'{"weight_map": {}, "weight_map": {}}'),
    "index is empty": written(INDEX, b""),
    "index is large": written(INDEX, b" " * (MAX_JSON_BYTES + 1)),
    "state is empty": written(STATE, b""),
    "state is deep": written(STATE, DEEP),
    "state is a list": written(STATE, []),
    "state says nothing": written(STATE, {}),
    "state is not UTF-8": written(STATE, b'{"global_step": "\xff"}'),
    "state has a key twice": written(STATE, b'{"global_step": 1, "global_step": 2}'),
    "state has a log of numbers": written(STATE, {"global_step": 1, "log_history": [1, 2]}),
    "state has a log of texts": written(STATE, {"global_step": 1, "log_history": ["loss"]}),
    "state has a log without steps": written(STATE, {"global_step": 1, "log_history": [{"loss": 1}]}
    ),
    "state has a text for a step": written(STATE, {"global_step": "x", "log_history": []}),
    "state has a huge number": written(STATE, b'{"global_step": ' + b"9" * 10**6 + b"}"),
    "state is a terabyte of nothing": replaced(
        STATE, lambda path: (path.touch(), os.truncate(path, 2**40))
    ),
    "scaler is not one": written("scaler.pt", torch_bytes({"scale": "x", "_growth_tracker": []})),
    "scaler is garbage": written("scaler.pt", b"x"),
    "optimizer is garbage": written("optimizer.pt", b"x"),
    **{f"{name} is a folder": replaced(name, Path.mkdir) for name in (MODEL, STATE, "scaler.pt")},
    **{f"{name} is a pipe": replaced(name, os.mkfifo) for name in (MODEL, STATE, "optimizer.pt")},
    **{
        f"{name} is a device": replaced(name, lambda path: path.symlink_to("/dev/zero"))
        for name in (MODEL, STATE, "optimizer.pt")
    },
    **{
        f"{name} is a link to a file elsewhere": replaced(
            name, lambda path: path.symlink_to("../secret.safetensors")
        )
        for name in (MODEL, STATE, "optimizer.pt")
    },
    "a link to itself": replaced(MODEL, lambda path: path.symlink_to(path.name)),
}  # fmt: skip


@pytest.mark.parametrize("attack", FOLDERS)
def test_a_malicious_folder_is_refused(tmp_path, attack):
    safetensors.torch.save_file({"secret": torch.ones(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    FOLDERS[attack](folder)
    assert "secret.safetensors: " not in refused(folder)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file_at_all_is_no_checkpoint(tmp_path, make):
    make(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", exit_code=Exit.USAGE)


def test_our_own_checkpoint_is_verified(tmp_path):
    found = small(tmp_path / "checkpoints")
    (found.path / "state.json").write_text("{}")
    assert "checkpoint step-5 cannot be used" in refused(found.path)


def test_programs_are_told_from_data_in_our_words(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError) as error:
        gather(tmp_path / "module.pt")
    assert error.value.exit_code == Exit.CHECKPOINT
    asked = "it asks for `torch.nn.modules.linear.Linear`, which is code and not data"
    assert error.value.problems[0].what.endswith(asked)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="a TorchScript program, which is code"):
        gather(tmp_path / "script.pt")
