"""Several processes that train together: killed, stopped, signalled, failing, started by others."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import PACED, Several
from tests.small import RECIPE

TWO = RECIPE.replace(
    "engine: {kind: local, device: cpu}",
    "engine: {kind: ddp, processes: 2, device: cpu, timeout_seconds: 20}\n"
    "output: {checkpoint_every: 20 steps, keep_last: 9}",
).replace("steps: 4", "steps: 60")
LONG = ("--set", "train.steps=100000")
OUT = ("small.yaml", "--output", "out", "--json")
FINAL = "final/model.safetensors"


def five_times(name, first, *others):
    """Each value five times in a row; the first one once in `make test-slow`."""
    values = [(value, time_) for time_ in range(5) for value in (first, *others)]
    return pytest.mark.parametrize(
        (name, "time_"),
        [
            pytest.param(*value, marks=pytest.mark.verify if number else pytest.mark.slow)
            for number, value in enumerate(values)
        ],
    )


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(TWO)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final weights of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "mpcli", "run", *OUT],
        cwd=folder, capture_output=True, text=True, timeout=180,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (folder / "out" / FINAL).read_bytes()


def result():
    return json.loads(Path("out/result.json").read_text())


def resumed(steps):
    """Go on to the end; the exit code."""
    run = Several("--resume", "out", "--set", f"train.steps={steps}", "--json", hook="")
    code, out, err = run.ended()
    assert code == 0, err
    assert json.loads(out)["steps_attempted"] == steps


def attempts():
    return sorted(path.name for path in Path("out/attempts").iterdir())


@five_times("rank", 1, 0)
def test_a_killed_rank_is_noticed_and_all_start_again_from_the_newest_checkpoint(
    rank, time_, whole
):
    run = Several(*OUT)
    pid = run.in_step(rank, 30)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while not Path("out/attempts/2").exists():
        assert time.monotonic() - killed < 3
        time.sleep(0.01)
    code, out, err = run.ended()
    assert (code, json.loads(out)["status"]) == (0, "done"), err
    assert Path("out", FINAL).read_bytes() == whole
    (reason,) = json.loads(Path("out/attempts/2/resumed.json").read_text())["changes"]
    assert reason.startswith(f"rank {rank} was killed by SIGKILL in step 3")
    assert reason in err
    steps = [json.loads(row) for row in Path("out/steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 61))
    assert [row["attempt"] for row in steps] == [1] * 20 + [2] * 40


@five_times("rank", 1)
def test_a_rank_that_hangs_ends_the_run_and_is_named(rank, time_):
    run = Several(*OUT, *LONG, "--set", "engine.timeout_seconds=8")
    pid = run.in_step(rank, 30)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.time()
    step = json.loads(Path(f"out/attempts/1/rank{rank}.json").read_text())["step"]
    code, out, err = run.ended()
    assert time.time() - stopped < 8 + 5
    assert code == 6
    assert f"rank {rank} hangs in step {step}" in err
    assert result() == json.loads(out)
    assert attempts() == ["1"]


@pytest.mark.verify
def test_a_rank_that_hangs_before_its_first_word_is_named():
    stop = "    if rank == 1: os.kill(os.getpid(), 19)\n"
    run = Several(*OUT, "--set", "engine.timeout_seconds=8", hook=PACED + "\n" + stop)
    code, _, err = run.ended(90)
    assert code == 6
    assert "rank 1 hangs before step 1" in err
    assert attempts() == ["1"]


@pytest.mark.verify
def test_output_may_be_a_file_beside_a_terminal():
    terminal, end = pty.openpty()
    with Path("out.json").open("w") as file:
        run = Several(*OUT, "--set", "train.steps=2", hook="", stdout=file, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is gone with its last process
        while text := os.read(terminal, 1024):
            shown += text
    os.close(terminal)
    assert run.ended()[0] == 0, shown.decode()
    assert json.loads(Path("out.json").read_text())["status"] == "done"


SIGNALS = {signal.SIGTERM: (75, "preempted"), signal.SIGINT: (130, "interrupted")}


@five_times("to", "rank 1", "rank 0", "the launcher", "all")
def test_a_signal_to_any_of_them_stops_all_at_the_same_step(to, time_):
    run = Several(*OUT, *LONG)
    pids = [run.in_step(rank, 30) for rank in (0, 1)]
    match to:
        case "the launcher":
            receivers = [run.process.pid]
        case "all":
            receivers = [run.process.pid, *pids]
        case _:
            receivers = [pids[int(to[-1])]]
    for pid in receivers:
        os.kill(pid, signal.SIGTERM)
    code, out, err = run.ended(60)
    told = json.loads(out)
    assert (code, told["status"]) == (75, "preempted"), err
    assert told["checkpoint"] == f"checkpoints/step-{told['steps_attempted']}"
    beats = [json.loads(Path(f"out/attempts/1/rank{rank}.json").read_text()) for rank in (0, 1)]
    assert {beat["step"] for beat in beats} == {told["steps_attempted"]}
    assert not list(Path("out/attempts/1").glob("failure*"))
    resumed(told["steps_attempted"] + 3)


@pytest.mark.verify
def test_ctrl_c_saves_and_ends():
    run = Several(*OUT, *LONG)
    run.in_step(1, 30)
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.ended(60)
    assert (code, json.loads(out)["status"]) == (130, "interrupted"), err
    assert json.loads(out)["checkpoint"] == f"checkpoints/step-{json.loads(out)['steps_attempted']}"


@pytest.mark.verify
def test_a_second_ctrl_c_waits_for_nothing():
    run = Several(*OUT, *LONG, hook="        time.sleep(600 if step == 30 else 0.05)")
    run.in_step(1, 30)
    run.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.process.poll() is None
    again = time.time()
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.ended(60)
    assert Path("out/result.json").stat().st_mtime - again < 5
    assert (code, json.loads(out)["status"]) == (130, "interrupted"), err


@pytest.mark.verify
@pytest.mark.parametrize("seconds", [0.5, 2, 4, 6])
def test_a_signal_in_the_start_ends_it(seconds):
    run = Several(*OUT, *LONG)
    while not Path("out/attempts/1").exists():
        time.sleep(0.01)
    time.sleep(seconds)
    run.process.send_signal(signal.SIGTERM)
    code, out, err = run.ended(60)
    assert (code, json.loads(out)["status"]) == (75, "preempted"), err


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_process_and_a_run_to_go_on_with():
    run = Several(*OUT, *LONG)
    run.in_step(1, 30)
    run.process.kill()
    assert run.ended()[0] == -signal.SIGKILL
    resumed(40)


@pytest.mark.verify
def test_restarts_are_used_up():
    run = Several(*OUT, "--set", "engine.max_restarts=1", hook=(
        "        if rank == 1 and step == 3: os.kill(os.getpid(), 9)"
    ))  # fmt: skip
    code, out, err = run.ended()
    assert code == 6
    assert attempts() == ["1", "2"]
    assert "rank 1 was killed by SIGKILL in step 3; `engine.max_restarts` is 1" in err
    assert json.loads(out)["reason"] == result()["reason"]


@pytest.mark.verify
def test_only_the_traceback_of_the_rank_that_failed_is_shown():
    run = Several("small.yaml", "--output", "out", hook=(
        "        if rank == 1 and step == 3: raise LookupError('of rank 1')"
    ))  # fmt: skip
    code, _, err = run.ended()
    assert code == 1
    told = err[err.index("rank 1 in step 3") :]
    assert len(told.splitlines()) <= 25
    assert err.count("Traceback") == 1
    assert "LookupError: of rank 1" in told
    assert result()["reason"] == "rank 1 in step 3: LookupError: of rank 1"
    assert "LookupError: of rank 1" in Path("out/attempts/1/log.rank1.txt").read_text()
    assert attempts() == ["1"]


@pytest.mark.verify
def test_a_data_worker_that_is_killed_holds_nobody_up(whole):
    run = Several(*OUT, "--set", "engine.data_workers=1")
    pid = run.in_step(1, 30)
    (children,) = Path(f"/proc/{pid}/task").glob(f"{pid}/children")
    (worker,) = children.read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    code, _, err = run.ended()
    assert code == 0, err
    assert Path("out", FINAL).read_bytes() == whole
    assert "a data worker was killed" in Path("out/attempts/1/log.rank1.txt").read_text()
    assert attempts() == ["1"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def ranks(*recipes, **more):
    """Processes that a script starts, one for each recipe."""
    port = free_port()
    return [
        Several(
            recipe, "--output", "out", "--json", hook="",
            RANK=str(rank), WORLD_SIZE=str(len(recipes)), MASTER_ADDR="localhost",
            MASTER_PORT=port, **more,
        )
        for rank, recipe in enumerate(recipes)
    ]  # fmt: skip


OTHER = """
    if rank == 1:
        from mpcli import member
        versions = member.versions
        member.versions = lambda: versions() | {"torch": "2.0.1"}
        member._code_sha256 = lambda: "abc"
"""


@five_times("recipe", "other.yaml")
def test_ranks_with_another_recipe_code_or_library_end_before_they_train(recipe, time_):
    Path(recipe).write_text(TWO.replace("lr: 0.1", "lr: 0.2"))
    for rank, run in enumerate(ranks("small.yaml", recipe, patch=OTHER)):
        code, out, err = run.ended()
        assert code == 2
        assert "optim.lr is `0.1` in rank 0 and `0.2` in rank 1" in err
        assert "and `abc` in rank 1" in err
        assert "and `2.0.1` in rank 1" in err
        assert err.count("error:") == 3, err
        assert not out if rank else json.loads(out)["exit_code"] == 2
    assert not Path("out").exists()


@pytest.mark.verify
def test_workers_with_other_code_end_before_they_train():
    code, out, err = Several(*OUT, hook="", patch=OTHER).ended()
    assert (code, json.loads(out)) == (2, result()), err
    assert "mptrain's code" in result()["reason"]
    assert "torch is" in result()["reason"]
    assert result()["steps_attempted"] == 0
    assert attempts() == ["1"]


@pytest.mark.verify
def test_plain_processes_train_together(whole):
    first, second = ranks("small.yaml", "small.yaml")
    code, out, err = first.ended()
    assert (code, json.loads(out)["status"]) == (0, "done"), err
    assert second.ended()[:2] == (0, "")
    assert Path("out", FINAL).read_bytes() == whole


@pytest.mark.verify
def test_processes_that_srun_started_train_together(whole):
    port = free_port()
    runs = [
        Several(
            *OUT, hook="", SLURM_JOB_ID="31234", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2",
            SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), MASTER_PORT=port,
            SLURM_STEP_NODELIST="localhost",
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [run.ended()[0] for run in runs] == [0, 0]
    assert Path("out", FINAL).read_bytes() == whole


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_torchrun_starts_it_and_starts_it_again(whole):
    command = (*TORCHRUN, "--max-restarts", "1", "-m", "mpcli")
    run = Several(*OUT, command=command, hook=PACED)
    os.kill(run.in_step(1, 30), signal.SIGKILL)
    code, out, err = run.ended()
    assert code == 0, err
    assert json.loads(out)["status"] == "done"  # once, of rank 0
    assert Path("out", FINAL).read_bytes() == whole
    assert attempts() == ["1", "2"]


@pytest.mark.verify
def test_one_process_engine_in_a_group_is_refused():
    Path("small.yaml").write_text(RECIPE)
    for run in ranks("small.yaml", "small.yaml"):
        code, _, err = run.ended()
        assert code == 2
        assert "kind: ddp" in err


def launchers():
    port = free_port()
    one = ("--set", "engine.processes=1")
    return [
        Several(*OUT, *one, "--nodes", "2", "--rdzv-endpoint", f"localhost:{port}")
        for _ in range(2)
    ]


@pytest.mark.verify
def test_launchers_of_two_machines_go_on_together_after_a_rank_was_killed(whole):
    runs = launchers()
    os.kill(runs[0].in_step(1, 30), signal.SIGKILL)
    ends = [run.ended() for run in runs]
    assert [code for code, _, _ in ends] == [0, 0], ends
    chief, follower = (json.loads(out) for _, out, _ in ends)
    assert chief == follower
    assert chief["status"] == "done"
    assert Path("out", FINAL).read_bytes() == whole
    assert attempts() == ["1", "2"]


@pytest.mark.verify
def test_a_signal_to_one_of_two_launchers_stops_all():
    runs = launchers()
    runs[0].in_step(1, 30)
    runs[1].process.send_signal(signal.SIGTERM)
    assert [run.ended()[0] for run in runs] == [75, 75]
    assert result()["status"] == "preempted"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--nodes", "2"), "add `--rdzv-endpoint HOST:PORT`"),
        (("--rdzv-endpoint", "localhost:1"), "add the number of machines"),
    ],
)
def test_machines_are_named_wholly(options, says, mptrain):
    told = mptrain("run", "small.yaml", *options)
    assert told.code == 2
    assert says in told.err
