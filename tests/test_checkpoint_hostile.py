"""Damaged and malicious checkpoints are refused with exit 4, fast, and execute nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mpcli.checkpoint import Checkpoint, load, newest_valid, verify
from mpcli.checkpoint.layout import (
    MANIFEST,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    STATE,
    TENSORS,
    encode,
)
from mpcli.recipe.errors import Exit, UserError
from tests.checkpoints import FILES, reseal, small

SECONDS = 1.0  # of CPU time


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small(tmp_path / "checkpoints", note='a "note" with 1 number and [brackets]')


def refusal(checkpoint: Checkpoint) -> str:
    """What is said of a checkpoint that must be refused by everything that reads it."""
    started = time.process_time()
    said = []
    for read in (verify, load, lambda checkpoint: newest_valid(checkpoint.path.parent)):
        with pytest.raises(UserError) as caught:
            read(checkpoint)
        assert caught.value.exit_code == Exit.CHECKPOINT
        said.append(str(caught.value))
    assert time.process_time() - started < 3 * SECONDS
    assert all(text.isprintable() and len(text) < 400 for text in said)
    return said[0]


# Damage


def silent_flips(checkpoint: Checkpoint, flips: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Which of the flipped bits nobody noticed."""
    unnoticed = []
    originals = {name: (checkpoint.path / name).read_bytes() for name in FILES}
    for name, bit in flips:
        damaged = bytearray(originals[name])
        damaged[bit // 8] ^= 1 << bit % 8
        (checkpoint.path / name).write_bytes(damaged)
        try:
            load(checkpoint)
            unnoticed.append((name, bit))
        except UserError as error:
            assert error.exit_code == Exit.CHECKPOINT
        (checkpoint.path / name).write_bytes(originals[name])
    load(checkpoint)
    return unnoticed


def all_bits(checkpoint: Checkpoint) -> list[tuple[str, int]]:
    return [
        (name, bit) for name in FILES for bit in range(8 * (checkpoint.path / name).stat().st_size)
    ]


def test_no_flipped_bit_is_silent(checkpoint):
    for name in FILES:
        bits = [flip for flip in all_bits(checkpoint) if flip[0] == name]
        assert silent_flips(checkpoint, random.Random(0).sample(bits, 100)) == []


@pytest.mark.verify
def test_not_one_of_all_bits_is_silent(checkpoint):
    assert silent_flips(checkpoint, all_bits(checkpoint)) == []


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_lengthened_files_are_refused(checkpoint, name):
    path = checkpoint.path / name
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        assert name in refusal(checkpoint)
    for more in (b"\0", b"\n", b" ", b"{}"):
        path.write_bytes(whole + more)
        assert name in refusal(checkpoint)


def test_exchanged_checkpoints_are_refused(checkpoint):
    other = small(checkpoint.path.parent, 6)
    for name in FILES:
        (checkpoint.path / name).rename(checkpoint.path.parent / "kept")
        shutil.copy(other.path / name, checkpoint.path / name)
        with pytest.raises(UserError):
            load(checkpoint)
        (checkpoint.path.parent / "kept").replace(checkpoint.path / name)
    shutil.rmtree(checkpoint.path)
    other.path.rename(checkpoint.path)
    assert "that of step 6" in refusal(checkpoint)


# Malice


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __reduce__(self):
        trace = Path(tempfile.gettempdir(), "mptrain-test-trace")
        return os.mkdir, (os.environ.get("MPTRAIN_TEST_TRACE", str(trace)),)


def in_place_of(name: str, content: bytes, *, sealed: bool = True) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if sealed:
            reseal(folder)

    return attack


def pickled(name: str, save: Callable[[object, Path], None]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        save(Bomb(), folder / name)
        if name in (TENSORS, STATE):
            reseal(folder)

    return attack


def dump(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def tensor_file(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def manifest(**changed: object) -> Callable[[Path], None]:
    return lambda folder: reseal(folder, **changed)


def named_in_manifest(name: str) -> Callable[[Path], None]:
    """A manifest that names a file which is there, with its right size and hash."""

    def attack(folder: Path) -> None:
        outside = folder / name
        if not outside.exists():
            outside.write_bytes(b"secret")
        reseal(folder)
        content = json.loads((folder / MANIFEST).read_text())
        content["files"][name] = content["files"][STATE]
        (folder / MANIFEST).write_bytes(encode(content))

    return attack


def replaced_by_link(name: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / name).rename(folder.parent / "moved")
        (folder / name).symlink_to("../moved")

    return attack


def folder_is_link(folder: Path) -> None:
    folder.rename(folder.parent / "moved")
    folder.symlink_to("moved")


def pipe(folder: Path) -> None:
    (folder / STATE).unlink()
    os.mkfifo(folder / STATE)


def subfolder(folder: Path) -> None:
    (folder / STATE).unlink()
    (folder / STATE).mkdir()


def folder_is_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def sparse(name: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(2**40)

    return attack


DEEP = b"[" * (MAX_JSON_BYTES // 2) + b"]" * (MAX_JSON_BYTES // 2)
WIDE = b'{"a":[' + b"[]," * 85_000 + b"[]]}"
ATTACKS: dict[str, Callable[[Path], None]] = {
    **{f"pickle in {name}": pickled(name, dump) for name in FILES},
    **{f"torch.save in {name}": pickled(name, torch.save) for name in FILES},
    **{
        f"pickle beside, {name}": pickled(name, dump)
        for name in (".metadata", "data.pkl", "pytorch_model.bin", "__init__.py", "x.safetensors")
    },
    **{
        f"foreign {name!a}": in_place_of(name, b"x", sealed=False)
        for name in ("\x1b[31mred", "<script>alert(1)", "[bold]", "a\nb", "x" * 255, ".hidden",
                     "state.json ", "STATE.JSON")
    },
    **{f"link {name}": replaced_by_link(name) for name in FILES},
    "folder is a link": folder_is_link,
    "folder is a file": folder_is_file,
    "pipe": pipe,
    "subfolder": subfolder,
    **{f"a terabyte of nothing in {name}": sparse(name) for name in FILES},
    "manifest names ..": named_in_manifest("../outside"),
    "manifest names an absolute path": manifest(files={"/etc/passwd": {"size": 1, "sha256": "0"}}),
    "manifest names itself": named_in_manifest(MANIFEST),
    "manifest names nothing": manifest(files={}),
    "manifest of another version": manifest(version=2),
    "manifest of another step": manifest(step=6),
    "manifest of a huge step": manifest(step=10**4000),
    "manifest with true for 1": manifest(version=True),
    "manifest with a float": manifest(step=5.0),
    "manifest with more": manifest(extra=1),
    "manifest is a list": in_place_of(MANIFEST, b"[]\n", sealed=False),
    "manifest is deep": in_place_of(MANIFEST, DEEP, sealed=False),
    "manifest is wide": in_place_of(MANIFEST, WIDE, sealed=False),
    "manifest is large": in_place_of(MANIFEST, b" " * 10**7, sealed=False),
    "state is deep": in_place_of(STATE, DEEP),
    "state is wide": in_place_of(STATE, WIDE),
    "state is wide and canonical": in_place_of(STATE, encode({"a": [[]] * 20_000})),
    "state is large": in_place_of(STATE, encode({"a": "x" * MAX_JSON_BYTES})),
    "state is a list": in_place_of(STATE, encode([])),  # type: ignore[arg-type]
    "state has a huge number": in_place_of(STATE, b'{"a": ' + b"9" * 400_000 + b"}"),
    "state has a number that overflows": in_place_of(STATE, b'{\n  "a": 1e999\n}\n'),
    "state has NaN": in_place_of(STATE, b'{\n  "a": NaN\n}\n'),
    "state has a key twice": in_place_of(STATE, b'{\n  "a": 1,\n  "a": 2\n}\n'),
    "state is not UTF-8": in_place_of(STATE, b'{\n  "a": "\xff"\n}\n'),
    "state is empty": in_place_of(STATE, b""),
    "tensors are empty": in_place_of(TENSORS, b""),
    "tensors are seven bytes": in_place_of(TENSORS, b"\0" * 7),
    "header says 2^63": in_place_of(TENSORS, tensor_file({}, size=2**63)),
    "header says more than there is": in_place_of(TENSORS, tensor_file({}, size=3)),
    "header too large": in_place_of(
        TENSORS, tensor_file(b"{" + b" " * (MAX_HEADER_BYTES + 2**20) + b"}")
    ),
    "header is deep": in_place_of(TENSORS, tensor_file(b'{"a":' * 10**5 + b"1" + b"}" * 10**5)),
    "header is not JSON": in_place_of(TENSORS, tensor_file(b"\x80\x04K\x01.")),
    "offsets overlap": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12))
    ),
    "many tensors in one place": in_place_of(
        TENSORS, tensor_file({f"{i}": entry(0, 8, [2]) for i in range(120_000)}, bytes(8))
    ),
    "two tensors in one place": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8))
    ),
    "offsets leave a gap": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12))
    ),
    "offsets run backwards": in_place_of(
        TENSORS, tensor_file({"a": entry(8, 0, [2])}, bytes(8))
    ),
    "offsets are negative": in_place_of(
        TENSORS, tensor_file({"a": entry(-8, 0, [2])}, bytes(8))
    ),
    "offsets run past the end": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 2**40, [2**38])}, bytes(8))
    ),
    "data that no tensor owns": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 4, [1])}, bytes(64))
    ),
    "shape is larger than its data": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 4, [2**30])}, bytes(4))
    ),
    "shape overflows": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 0, [2**32, 2**32, 0])})
    ),
    "shape overflows to fit": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 4, [2**62, 4, 1])}, bytes(4))
    ),
    "type is unknown": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 4, [1], "PICKLE")}, bytes(4))
    ),
    "type is not torch's": in_place_of(
        TENSORS, tensor_file({"a": entry(0, 3, [4], "F6_E2M3")}, bytes(3))
    ),
}  # fmt: skip
HARMLESS = {"state is wide and canonical"}  # only what it costs to read is of interest


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in HARMLESS])
def test_a_malicious_checkpoint_is_refused(checkpoint, attack, tmp_path, monkeypatch):
    monkeypatch.setenv("MPTRAIN_TEST_TRACE", str(tmp_path / "trace"))
    ATTACKS[attack](checkpoint.path)
    refusal(checkpoint)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in HARMLESS])
def test_a_good_one_before_it_is_used_and_stays(checkpoint, attack):
    before = small(checkpoint.path.parent, 4, keep_last=3)
    checkpoint = small(checkpoint.path.parent, 5, keep_last=3)
    ATTACKS[attack](checkpoint.path)
    found, (warning,) = newest_valid(checkpoint.path.parent)
    assert found == before
    assert warning.what.startswith("checkpoint step-5 cannot be used: ")
    again = small(checkpoint.path.parent, 5)
    assert newest_valid(checkpoint.path.parent) == (again, [])


def test_links_are_removed_and_not_followed(checkpoint, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"x")
    folder = checkpoint.path.parent
    for name in ("step-3", "step-4", "step-5.tmp", "step-6.tmp", "step-5.old"):
        (folder / name).symlink_to(precious)
    assert newest_valid(folder) == (checkpoint, [])
    small(folder, 6, keep_last=1)
    assert [path.name for path in folder.iterdir()] == ["step-6"]
    assert (precious / "file").read_bytes() == b"x"


def test_the_folder_of_checkpoints_is_not_a_link(checkpoint, tmp_path):
    folder = checkpoint.path.parent
    (folder / "step-6.tmp").mkdir()
    folder.rename(tmp_path / "moved")
    folder.symlink_to("moved")
    for read in (lambda: newest_valid(folder), lambda: load(checkpoint)):
        with pytest.raises(UserError) as caught:
            read()
        assert caught.value.exit_code == Exit.CHECKPOINT
    assert (tmp_path / "moved" / "step-6.tmp").exists()


@pytest.mark.parametrize("attack", ["manifest is large", "state is large"])
def test_what_is_too_large_is_called_so(checkpoint, attack):
    ATTACKS[attack](checkpoint.path)
    assert refusal(checkpoint).endswith(f"is larger than {MAX_JSON_BYTES} bytes")


def test_an_unreadable_file_is_refused(checkpoint, monkeypatch):
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mpcli.checkpoint.reader.sha256", denied)
    assert refusal(checkpoint) == "checkpoint step-5 cannot be used: Permission denied"


UNDER_AUDIT = """
import sys, time
from pathlib import Path
from mpcli.checkpoint import Checkpoint, load, newest_valid
from mpcli.recipe.errors import Exit, UserError
cases = [Path(line) for line in sys.stdin.read().splitlines()]
load(newest_valid(cases.pop(0))[0])  # a good one: everything that reading needs is loaded now
seen = []
FORBIDDEN = ("exec", "compile", "import", "subprocess.", "os.system", "os.exec", "os.posix_spawn",
             "os.fork", "os.spawn", "socket.", "pickle.", "marshal.", "ctypes.", "urllib.",
             "os.mkdir", "os.remove", "os.rename", "os.symlink", "os.chmod", "os.putenv",
             "shutil.", "code.__new__", "sys.addaudithook")
def audit(event, arguments):
    writing = event == "open" and set(str(arguments[1] or "")) & set("wax+")
    if event.startswith(FORBIDDEN) or writing:
        seen.append(f"{event} {arguments!r:.200}")
        raise RuntimeError(f"forbidden: {event}")
sys.addaudithook(audit)
allowed = 0
slow = []
for case in cases:
    for read in (newest_valid, lambda folder: load(Checkpoint(folder / "step-5", 5))):
        started = time.process_time()
        try:
            read(case)
            allowed += 1
        except UserError as error:
            assert error.exit_code == Exit.CHECKPOINT, error
        if (seconds := time.process_time() - started) > 1:
            slow.append((case.name, seconds))
print(allowed, slow, seen)
"""


@pytest.mark.slow
def test_reading_executes_nothing(tmp_path):
    """Every attack and the good one, in a process whose audit hook raises at what is forbidden."""
    cases = []
    for number, attack in enumerate([lambda folder: None, lambda folder: None, *ATTACKS.values()]):
        folder = tmp_path / str(number) / "checkpoints"
        folder.parent.mkdir()
        attack(small(folder).path)
        cases.append(folder)
    done = subprocess.run(
        [sys.executable, "-c", UNDER_AUDIT],
        input="\n".join(map(str, cases)), capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"MPTRAIN_TEST_TRACE": str(tmp_path / "trace")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    may_be_read = 2 * (1 + len(HARMLESS))
    assert done.stdout.strip() == f"{may_be_read} [] []"
    assert not (tmp_path / "trace").exists()


def test_the_audit_would_see_a_pickle(tmp_path):
    """The same hook, and a reader that is as careless as `torch.load` without `weights_only`."""
    program = UNDER_AUDIT.replace(
        "from mpcli.checkpoint import Checkpoint, load, newest_valid",
        "import pickle\nload = newest_valid = lambda path: [pickle.loads(path.read_bytes())]",
    ).replace("\nload(newest_valid(cases.pop(0))[0])", "\ncases.pop(0)").replace(
        "read(case)", "newest_valid(case)"
    )  # fmt: skip
    dump(Bomb(), tmp_path / "bomb")
    done = subprocess.run(
        [sys.executable, "-c", program], input=f"-\n{tmp_path / 'bomb'}",
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env=os.environ | {"MPTRAIN_TEST_TRACE": str(tmp_path / "trace")},
    )  # fmt: skip
    assert "forbidden: pickle.find_class" in done.stderr
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", [STATE, TENSORS])
def test_terabytes_of_nothing_are_refused_at_once(checkpoint, name):
    """Sparse files, whose size the manifest knows: nobody hashes them."""
    path = checkpoint.path / name
    os.truncate(path, 2**40)
    value = json.loads((checkpoint.path / MANIFEST).read_text())
    value["files"][name]["size"] = 2**40
    (checkpoint.path / MANIFEST).write_bytes(encode(value))
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        verify(checkpoint)
    assert caught.value.exit_code == Exit.CHECKPOINT
    assert time.process_time() - began < 1
