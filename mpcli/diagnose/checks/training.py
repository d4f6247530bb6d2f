"""Training itself: gradients that explode or vanish, lost updates, wrong rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding

TRAINING: tuple[Callable[[Evidence], Iterable[Finding]], ...] = ()
