"""The published archive, fetched and checked by torchvision."""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpcli.data.cache import cache_dir
from mpcli.data.cifar.spec import Cifar

_TIMEOUT_SECONDS = 30.0


def published(cifar: Cifar) -> Any:
    """torchvision's class of the data set, which knows the address and the MD5 of every file."""
    from torchvision import datasets

    return datasets.CIFAR10 if cifar.kind == "cifar10" else datasets.CIFAR100


def download_dir(cifar: Cifar) -> Path:
    """Where a downloaded data set stays."""
    return cache_dir() / "download" / cifar.kind


def download(cifar: Cifar) -> None:
    """Fill `download_dir` with the python version, wholly or not at all. Progress is on stderr.

    Raises:
        OSError: no network, or nowhere to write to.
        RuntimeError: the archive has not the published MD5.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    files = published(cifar)
    target = download_dir(cifar)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{cifar.kind}-") as folder,
        contextlib.redirect_stdout(sys.stderr),
        _socket_timeout(),
    ):
        download_and_extract_archive(files.url, folder, filename=files.filename, md5=files.tgz_md5)
        (Path(folder) / cifar.python_folder).replace(target)


@contextlib.contextmanager
def _socket_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
