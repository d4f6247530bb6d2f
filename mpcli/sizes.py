"""Sizes in bytes and metrics, for people."""

from __future__ import annotations

_SHARES = ("accuracy", "masked_accuracy", "f1")


def size_text(num_bytes: int) -> str:
    """Bytes for people, as `--capacity` takes them: `1.2GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g}{unit}"
    return f"{num_bytes}B"


def metric_text(name: str, value: float) -> str:
    """A metric's value for people: shares in percent."""
    if name in _SHARES and abs(value) <= 1:
        return f"{value:.2%}"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
