"""Files of safetensors: tensors are mapped, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpcli.checkpoint.layout import MAX_HEADER_BYTES
from mpcli.diagnose.reading import parse_json, size_of, unreadable


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by name, each mapped into memory while it is looked at.

    Raises:
        UserError: exit 4, before the first tensor for all that is wrong with the header.
    """
    _check_header(path)
    try:
        # Opening it refuses overlaps, gaps, and sizes that do not fit the data.
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, str(error)) from error


def _check_header(path: Path) -> None:
    """Its length and its keys, before anybody allocates for them."""
    size = size_of(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise unreadable(path, "it ends before its header does")
            if length > MAX_HEADER_BYTES:
                raise unreadable(path, f"its header has {length} bytes")
            parse_json(file.read(length))
    except (OSError, ValueError) as error:
        raise unreadable(path, f"its header: {error}") from error
