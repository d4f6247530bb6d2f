"""The loss scale: too low, too high, without a floor that holds, or a storm of skipped steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding

SCALE: tuple[Callable[[Evidence], Iterable[Finding]], ...] = ()
