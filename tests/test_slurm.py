"""The batch script begins a run, goes on with it when it is requeued, and passes other ends on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from mpcli.recipe.packaged import packaged_dir

SCRIPT = packaged_dir("recipes") / "slurm" / "train.sbatch"

# As of mptrain under srun: the run directory is made, and the code is what a file says.
SRUN = """\
#!/bin/bash
printf '%s\\n' "$*" >> calls
mkdir -p "my runs/one" && touch "my runs/one/recipe.yaml"
exit "$(cat code)"
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then printf '%s\\n' node7 node8; else printf '%s\\n' "scontrol $*" >> calls; fi
exit "$(cat scontrol-code 2> /dev/null || echo 0)"
"""
OPTIONS = "--nodes 2 --rdzv-endpoint node7:21234 --set optim.lr=0.1"


class Cluster:
    """A folder with executables that stand for SLURM's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, code: int, *arguments: str) -> tuple[int, list[str]]:
        """Run the script; `code` is that of the launchers. Its own, and what it called."""
        (self.folder / "code").write_text(str(code))
        (self.folder / "calls").write_text("")
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "31234",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
        }
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], cwd=self.folder, env=environment, check=False
        )
        return done.returncode, (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


ARGUMENTS = ("recipe.yaml", "my runs/one", "--set", "optim.lr=0.1")


def test_a_stopped_job_is_requeued_and_goes_on(cluster: Cluster) -> None:
    code, (launched, requeued) = cluster.start(75, *ARGUMENTS)
    assert code == 0
    assert launched.endswith(f"mptrain run recipe.yaml --output my runs/one {OPTIONS}")
    assert requeued == "scontrol requeue 31234"
    code, (launched,) = cluster.start(0, *ARGUMENTS)
    assert code == 0
    assert launched.endswith(f"mptrain run --resume my runs/one {OPTIONS}")


@pytest.mark.parametrize("code", [0, 1, 2, 5, 6, 130, 137])
def test_every_other_end_is_the_jobs(cluster: Cluster, code: int) -> None:
    found, calls = cluster.start(code, *ARGUMENTS)
    assert found == code and len(calls) == 1


def test_a_folder_without_a_run_is_begun_in(cluster: Cluster) -> None:
    (cluster.folder / "my runs" / "one").mkdir(parents=True)
    assert "--output my runs/one" in cluster.start(0, *ARGUMENTS)[1][0]


def test_a_requeue_that_fails_is_the_jobs_end(cluster: Cluster) -> None:
    (cluster.folder / "scontrol-code").write_text("1")
    assert cluster.start(75, *ARGUMENTS)[0] == 1


def test_nothing_starts_without_a_run_directory(cluster: Cluster) -> None:
    assert cluster.start(0, "recipe.yaml") == (2, [])


def test_the_signal_goes_to_the_launchers_before_the_limit() -> None:
    directives = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=TERM@120", "#SBATCH --requeue"} <= set(directives)
    assert "#SBATCH --ntasks-per-node=1" in directives
