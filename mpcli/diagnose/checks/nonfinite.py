"""Where a NaN or an infinity was born: batch, forward, backward, and which kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding

NONFINITE: tuple[Callable[[Evidence], Iterable[Finding]], ...] = ()
