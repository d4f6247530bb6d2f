"""A long run takes no more memory than a short one (`make verify`); see docs/verification.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify.page import write
from tests.victims import tiny_run

pytestmark = pytest.mark.verify
STEPS = 20_000
BEGUN = 2_000


def test_memory_of_a_long_run(tmp_path: Path) -> None:
    rows = tiny_run(tmp_path, STEPS)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    resident = [row["memory_allocated_bytes"] for row in rows]
    grown = max(resident[BEGUN:]) - resident[BEGUN - 1]
    write(
        "memory",
        [
            (
                f"Resident memory of {STEPS:,} tiny steps: growth after step {BEGUN:,}",
                f"{grown / 1e6:.2f} MB",
            )
        ],
    )
    assert grown < 20e6
