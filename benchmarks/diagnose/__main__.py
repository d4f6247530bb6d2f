"""The fault benchmark: every class of fault in every family of models, diagnosed and mended.

Results are kept in `build/diagnose-<seed>` as they come, so that a benchmark that was stopped goes
on; the table is in docs/diagnose.md when all of it is there.

    make bench-diagnose
    python -m benchmarks.diagnose --development --only underflow
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.diagnose.faults import FAMILIES, Cell, cells, left_out
from benchmarks.diagnose.healthy import healthy_runs
from benchmarks.diagnose.jobs import alarms_of, control_of, examined, one_thread
from benchmarks.diagnose.score import control_name
from benchmarks.diagnose.table import write_table

ROOT = Path(__file__).parents[2]


def main() -> None:
    arguments = parsed()
    seed, outsider = arguments.seed, left_out(arguments.seed)
    print(f"seed {seed}: {outsider} is left out of development")
    families = [arguments.family] if arguments.family else [
        family for family in FAMILIES if not (arguments.development and family == outsider)
    ]  # fmt: skip
    results = Results(ROOT / "build" / f"diagnose-{seed}")
    every = cells(seed)
    chosen = {
        name: cell
        for name, cell in every.items()
        if isinstance(cell, Cell)
        and cell.family in families
        and (not arguments.only or re.fullmatch(arguments.only, cell.fault))
    }
    with ProcessPoolExecutor(
        arguments.processes, multiprocessing.get_context("spawn"), initializer=one_thread
    ) as pool:
        controls = {control_name(cell): cell for cell in chosen.values()}
        results.fill(pool, "control", {
            name: (control_of, cell.name, seed) for name, cell in controls.items()
        })  # fmt: skip
        kind = "fault" if arguments.faults_only else "cell"
        results.fill(pool, kind, {
            name: (examined, name, seed, results.get("control", control_name(cell)),
                   not arguments.faults_only)
            for name, cell in chosen.items()
        })  # fmt: skip
        if not arguments.faults_only and not arguments.only:
            runs = {run.name: run for run in healthy_runs(families, seed)}
            results.fill(pool, "healthy", {name: (alarms_of, run) for name, run in runs.items()})
    if families == list(FAMILIES) and not (arguments.only or arguments.faults_only):
        scores = {name: results.get("cell", name) for name in chosen}
        healthy = {name: results.get("healthy", name) for name in runs}
        write_table(ROOT / "docs" / "diagnose.md", every, scores, healthy, seed)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=103, help="of weights, places and the family")
    parser.add_argument("--only", metavar="CLASS", help="a regular expression")
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--development", action="store_true", help="without the drawn family")
    parser.add_argument("--faults-only", action="store_true", help="whether the faults are real")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args()


class Results:
    """JSON files, one for each training or cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, kind: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path(kind, name).read_text("utf-8"))
        return found

    def fill(
        self, pool: ProcessPoolExecutor, kind: str, jobs: dict[str, tuple[Callable[..., Any], ...]]
    ) -> None:
        """Do what is not there yet: name -> (function, its arguments)."""
        left = {name: job for name, job in jobs.items() if not self._path(kind, name).exists()}
        running = {pool.submit(*job): name for name, job in left.items()}
        for number, done in enumerate(as_completed(running), start=1):
            name, path = running[done], self._path(kind, running[done])
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"name": name, **done.result()}, indent=1), "utf-8")
            temporary.rename(path)
            print(f"{kind} {number}/{len(left)} {name}: {short(done.result())}", flush=True)

    def _path(self, kind: str, name: str) -> Path:
        plain = re.sub(r"[^\w.-]+", "-", name)[:60]
        return self.folder / kind / f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def short(result: dict[str, Any]) -> str:
    """A result in a line."""
    names = (
        *("state", "why", "losses", "loss", "healthy", "skipped", "activations"),
        *("found", "layer", "phase", "patch", "alarms"),
    )
    return ", ".join(f"{name} {_number(result[name])}" for name in names if name in result)


def _number(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.3g}"
    return [_number(part) for part in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
