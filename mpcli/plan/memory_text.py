"""What a run without memory is told: what needs how much."""

from __future__ import annotations

from mpcli.records import MemoryPlan

_PARTS = (
    *("weights", "masters", "gradients", "optimizer", "average", "buffers"),
    *("batch", "activations"),
)


def size_text(num_bytes: int) -> str:
    """Bytes for people, as `--capacity` takes them: `1.2GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g}{unit}"
    return f"{num_bytes}B"


def parts_text(memory: MemoryPlan) -> str:
    """The parts that matter and the peak, in a line."""
    parts = ((name, getattr(memory, name)) for name in _PARTS)
    told = ", ".join(f"{name} {size_text(num)}" for name, num in parts if num >= memory.peak / 100)
    return f"planned: {told}; peak {size_text(memory.peak)} in {memory.peak_at}"
