"""docs/verification.md, which `make verify` writes, and runs to write about."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.processes import MPTRAIN
from tests.verify.test_precision import ROOT, docs

PAGE = ROOT / "docs" / "verification.md"
Rows = list[tuple[str, str]]


def write(region: str, rows: Rows, about: str = "") -> None:
    """Rows (what, measured) between the page's markers, with what they were measured on above."""
    text = about + docs().table(("what", "measured"), rows)
    PAGE.write_text(docs().between(PAGE.read_text("utf-8"), region, text, "make verify"), "utf-8")


def machine() -> str:
    """What the times of a table depend on."""
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}.\n\n"
    )


def run(
    folder: Path, recipe: str, *overrides: str, processes: int = 1
) -> tuple[dict[str, Any], list[float]]:
    """`mptrain run` on every core, which its processes share: its result and its losses."""
    arguments = [argument for override in overrides for argument in ("--set", override)]
    process = subprocess.run(
        [MPTRAIN, "run", ROOT / "recipes" / recipe, "--json", "--output", folder, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str((os.cpu_count() or 1) // processes)},
        stdout=subprocess.PIPE,
        check=True,
    )
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return json.loads(process.stdout), [float(row["loss"]) for row in rows]
