"""Time, memory and size of a report of a large run, in a process of its own.

The run is made up: 10,000 steps, and 100 sampled steps of 60 layers with eight tensors each, which
is as much as `layers.jsonl` may hold. Ends with 1 above 5 s (the fastest of some: what else the
machine does is none of its time), 500 MB, or 5 MB of report.

    make bench-report
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.report.synthetic import made_up_run

REPEATS = 5
MOST = {"seconds": 5.0, "memory_bytes": 500e6, "report_bytes": 5e6}


def measure(run: Path, file: Path) -> tuple[float, float]:
    """Seconds on the clock and of CPU time that `mptrain report` takes."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "mpcli", "report", str(run), "-o", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


def main() -> int:
    """Print one object of JSON; 1 where a limit is passed."""
    with tempfile.TemporaryDirectory() as folder:
        run = made_up_run(Path(folder, "run"), steps=10_000, sampled=100, layers=60)
        file = Path(folder, "report.html")
        times = [measure(run, file) for _ in range(REPEATS)]
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        found = {
            "machine": platform.platform(),
            "seconds": [round(wall, 2) for wall, _ in times],
            "cpu_seconds_median": round(statistics.median(cpu for _, cpu in times), 2),
            "memory_bytes": peak,
            "layers_bytes": (run / "layers.jsonl").stat().st_size,
            "report_bytes": file.stat().st_size,
        }
    print(json.dumps(found, indent=2))
    reached = {**found, "seconds": min(wall for wall, _ in times)}
    passed = [name for name, most in MOST.items() if reached[name] > most]
    if passed:
        print(f"above the limit: {', '.join(passed)}", file=sys.stderr)
    return bool(passed)


if __name__ == "__main__":
    sys.exit(main())
