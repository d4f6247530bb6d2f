"""What a loop of one's own does wrong around the numbers; only a recorder sees that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding

LOOP: tuple[Callable[[Evidence], Iterable[Finding]], ...] = ()
