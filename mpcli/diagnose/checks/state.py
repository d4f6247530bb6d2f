"""What is stored: weights, optimizer state, buffers, checkpoints; and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding

STATE: tuple[Callable[[Evidence], Iterable[Finding]], ...] = ()
