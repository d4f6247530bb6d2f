"""The cache of decoded images."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from mpcli.data.cache import cache_dir, cached, content_key
from mpcli.data.cifar import parquet
from mpcli.data.image_sources import load
from mpcli.data.images import Split, Splits
from mpcli.recipe.data import Cifar10
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


def never() -> Splits:
    raise AssertionError("decoded again")


def equal(one: Splits, other: Splits) -> bool:
    pairs = zip((*one.train, *one.eval), (*other.train, *other.eval), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_what_was_decoded_once_is_not_decoded_again(cache: Path):
    assert cached("key", lambda: SPLITS) is SPLITS
    assert equal(cached("key", never), SPLITS)
    (file,) = (cache / "decoded").iterdir()
    assert file.name == "key.safetensors"


@pytest.mark.parametrize("position", [0, 40, -1], ids=["header", "names", "pixels"])
def test_a_damaged_file_is_made_again(cache: Path, caplog: pytest.LogCaptureFixture, position: int):
    cached("key", lambda: SPLITS)
    file = cache / "decoded" / "key.safetensors"
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert cached("key", lambda: SPLITS) is SPLITS
    assert "is damaged" in caplog.text
    assert equal(cached("key", never), SPLITS)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_file_cut_off_is_made_again(cache: Path, size: int):
    cached("key", lambda: SPLITS)
    file = cache / "decoded" / "key.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert cached("key", lambda: SPLITS) is SPLITS
    assert equal(cached("key", never), SPLITS)


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "file" / "below"))
    assert cached("key", lambda: SPLITS) is SPLITS
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "not cached" in caplog.text


def test_a_write_that_fails_leaves_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def disk_full(_: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("mpcli.data.cache.save_file", disk_full)
    assert cached("key", lambda: SPLITS) is SPLITS
    assert not list((cache / "decoded").iterdir())


def test_the_key_follows_content_and_order(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    keys = {
        content_key("cifar10", [one, other]),
        content_key("cifar10", [other, one]),
        content_key("cifar100", [one, other]),
    }
    assert len(keys) == 3
    copy = tmp_path / "copy"
    copy.write_bytes(b"1")
    assert content_key("cifar10", [copy, other]) == content_key("cifar10", [one, other])


def test_images_are_decoded_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "set"
    data = Cifar10(kind="cifar10", path=str(folder))
    write_tiny_cifar(folder, 20, 10)
    first, _ = load(data)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "read", lambda *_: never())
        again, _ = load(data)
    assert equal(first, again)
    write_tiny_cifar(folder, 10, 10)
    assert len(load(data)[0].train.labels) == 10


def test_the_default_place_is_below_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MPTRAIN_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/.cache/mptrain")
