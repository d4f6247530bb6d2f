"""Sizes in bytes, for people."""

from __future__ import annotations


def size_text(num_bytes: int) -> str:
    """Bytes for people, as `--capacity` takes them: `1.2GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g}{unit}"
    return f"{num_bytes}B"
