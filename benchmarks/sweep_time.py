"""How long a loss-scale sweep of eight scales takes, in runs of its recipe.

The digits in fp16 as shipped, against `mptrain sweep loss-scale --jobs 2` of eight scales: an fp32
reference, a run of 88 steps at each scale and one that confirms what is recommended. Wall time,
the start of all processes included, one after the other. Ends with 1 where the sweep takes more
than four runs.

    python -m benchmarks.sweep_time
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "run": ("run", "digits-fp16.yaml"),
    "sweep": (
        *("sweep", "loss-scale", "digits-fp16.yaml"),
        *("--values", "1,2^4,2^8,2^10,2^12,2^14,2^16,2^20", "--jobs", "2"),
    ),
}
REPEATS = 3
MOST_RUNS = 4.0


def seconds(*command: str) -> float:
    """Of `mptrain` with these arguments, in a folder of its own."""
    mptrain = (sys.executable, "-P", "-m", "mpcli")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*mptrain, "init", "digits-fp16"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        started = time.perf_counter()
        subprocess.run([*mptrain, *command], cwd=folder, check=True, capture_output=True)
        return time.perf_counter() - started


def main() -> int:
    """Print all times and the ratio of their medians; 1 where that is too large."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(*command))
    run, sweep = (statistics.median(times[name]) for name in COMMANDS)
    for name, seconds_each in times.items():
        print(name, " ".join(f"{one:.1f}" for one in seconds_each), "s")
    print(f"run {run:.1f} s, sweep of 8 scales {sweep:.1f} s: {sweep / run:.2f} runs")
    return int(sweep / run > MOST_RUNS)


if __name__ == "__main__":
    sys.exit(main())
