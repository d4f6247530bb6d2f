"""Checks: small functions `Evidence -> Iterable[Finding]`, each of which knows one kind of fault.

A check says only what the numbers prove, and how sure that is. It does not care what others find:
`mpcli.diagnose.ranking` tells causes from consequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mpcli.diagnose.checks.loop import LOOP
from mpcli.diagnose.checks.nonfinite import NONFINITE
from mpcli.diagnose.checks.scale import SCALE
from mpcli.diagnose.checks.silent import SILENT
from mpcli.diagnose.checks.state import STATE
from mpcli.diagnose.checks.training import TRAINING
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.finding import Finding

Check = Callable[[Evidence], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (*NONFINITE, *SILENT, *SCALE, *TRAINING, *LOOP, *STATE)


def findings(evidence: Evidence) -> list[Finding]:
    """What all checks say, in no particular order."""
    return [finding for check in CHECKS for finding in check(evidence)]
