"""What needs how much of the memory, in words."""

from __future__ import annotations

from mpcli.records import MemoryPlan
from mpcli.sizes import size_text

_PARTS = (
    *("weights", "masters", "gradients", "optimizer", "average", "buffers"),
    *("batch", "activations"),
)


def parts_text(memory: MemoryPlan) -> str:
    """The parts that matter and the peak, in a line."""
    parts = ((name, getattr(memory, name)) for name in _PARTS)
    told = ", ".join(f"{name} {size_text(num)}" for name, num in parts if num >= memory.peak / 100)
    return f"planned: {told}; peak {size_text(memory.peak)} in {memory.peak_at}"
