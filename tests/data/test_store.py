"""Arrays on disk, and the images kept there."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpcli.data.cifar import parquet
from mpcli.data.image_sources import load
from mpcli.data.images import Split, Splits, stored_splits, write_split
from mpcli.data.store import Writer, stored
from mpcli.recipe.data import Cifar10
from mpcli.recipe.errors import Exit, UserError
from tests.tiny_cifar import write_tiny_cifar

SPLITS = Splits(
    Split(torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4), torch.tensor([1, 0])),
    Split(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.tensor([1])),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MPTRAIN_CACHE", str(folder))
    return folder


def make(writer: Writer) -> dict[str, Any]:
    write_split(writer, "train", Split(SPLITS.train.images[:1], SPLITS.train.labels[:1]))
    write_split(writer, "train", Split(SPLITS.train.images[1:], SPLITS.train.labels[1:]))
    write_split(writer, "eval", SPLITS.eval)
    return {"skipped": 3}


def never(*_: object) -> Any:
    raise AssertionError("made again")


def get(make: Callable[[Writer], dict[str, Any]]) -> Splits:
    arrays, facts = stored("key", make)
    assert facts == {"skipped": 3}
    return stored_splits(arrays)


def equal(one: Splits, other: Splits) -> bool:
    pairs = zip((*one.train, *one.eval), (*other.train, *other.eval), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_what_was_made_once_is_mapped_from_then_on(cache: Path) -> None:
    assert equal(get(make), SPLITS)
    assert equal(get(never), SPLITS)
    arrays, _ = stored("key", never)
    assert all(isinstance(array.base, np.memmap) for array in arrays.values())
    assert [path.name for path in (cache / "arrays").iterdir()] == ["key"]


def test_writing_to_what_is_mapped_leaves_the_file_as_it_is() -> None:
    get(make).train.images.zero_()
    assert equal(get(never), SPLITS)


@pytest.mark.parametrize("size", [0, 1, -1, None], ids=["empty", "short", "shorter", "flipped"])
@pytest.mark.parametrize("name", ["train.images.bin", "eval.labels.bin", "index.json"])
def test_what_is_damaged_is_made_again(
    cache: Path, caplog: pytest.LogCaptureFixture, name: str, size: int | None
) -> None:
    get(make)
    file = cache / "arrays" / "key" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if size is None else file.read_bytes()[:size])
    assert equal(get(make), SPLITS)
    assert "is damaged" in caplog.text
    assert equal(get(never), SPLITS)


@pytest.mark.parametrize(
    ("was", "becomes"), [("|u1", "|O"), ('"skipped": 3', '"skipped": 4'), ("[3, 4, 4]", "[-1]")]
)
def test_an_index_that_says_something_else_is_not_believed(
    cache: Path, was: str, becomes: str
) -> None:
    get(make)
    file = cache / "arrays" / "key" / "index.json"
    text = file.read_text()
    assert was in text
    file.write_text(text.replace(was, becomes))
    assert equal(get(make), SPLITS)


def test_a_type_that_is_no_number_is_not_mapped(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(make)
    file = cache / "arrays" / "key" / "index.json"
    about = json.loads(file.read_text().replace("|u1", "|O"))
    monkeypatch.setattr("mpcli.data.store._index_digest", lambda index: about["sha256"])
    file.write_text(json.dumps(about))
    assert stored("key", make)[0]["train.images"].dtype == np.uint8


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "file" / "below"))
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    assert equal(get(make), SPLITS)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "nothing is kept for the next run" in caplog.text
    assert not list(room.iterdir())


def test_without_any_room_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to the cache") as caught:
        get(make)
    assert caught.value.exit_code == Exit.STORAGE


def test_a_write_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Writer, facts: object) -> None:
        raise UserError

    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(Writer, "finish", full)
        get(make)
    assert not list((cache / "arrays").iterdir())


def test_what_cannot_be_read_is_not_blamed_on_the_store() -> None:
    def unreadable(writer: Writer) -> dict[str, Any]:
        raise PermissionError("of the data")

    with pytest.raises(PermissionError, match="of the data"):
        get(unreadable)


def test_who_comes_second_takes_what_the_first_has_made(cache: Path) -> None:
    def slow(writer: Writer) -> dict[str, Any]:
        facts = make(writer)
        if not (cache / "arrays" / "key").exists():
            os.getpid, pid = (lambda: -1), os.getpid
            try:
                get(make)
            finally:
                os.getpid = pid
        return facts

    assert equal(get(slow), SPLITS)


def test_images_are_decoded_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    data = Cifar10(kind="cifar10", path=str(folder))
    write_tiny_cifar(folder, 20, 10)
    first, _ = load(data)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "read", never)
        again, _ = load(data)
    assert equal(first, again)
    write_tiny_cifar(folder, 10, 10)
    assert len(load(data)[0].train.labels) == 10
