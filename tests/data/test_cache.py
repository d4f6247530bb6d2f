"""Where what is made of data is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcli.data.cache import cache_dir, content_key


def test_the_key_follows_content_and_order(tmp_path: Path) -> None:
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


def test_the_default_place_is_below_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPTRAIN_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/.cache/mptrain")
