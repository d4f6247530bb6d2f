"""What a sweep runs: one cell for each setting and seed, each an ordinary run."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        label: what it is among the others, such as `fp32`, `scale=256` or `optim.lr=0.003`.
        settings: `path=value` overrides of the sweep's recipe, without the seed.
        seed: `train.seed`.
    """

    label: str
    settings: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Of its run's folder; the same for the same cell, whichever process runs it."""
        plain = re.sub(r"[^A-Za-z0-9.=_+-]+", "-", self.label)[:100]
        if plain != self.label:  # two labels may have become one
            plain += f"-{hashlib.sha256(self.label.encode()).hexdigest()[:8]}"
        return f"{plain}-seed{self.seed}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """All of its `path=value`."""
        return (*self.settings, f"train.seed={self.seed}")
