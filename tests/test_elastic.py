"""Which failure of many is the root, and where a process stands in its group."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import mpcli
from mpcli import worker
from mpcli.elastic import _lives, root_cause
from mpcli.member import agreed, facts
from mpcli.position import first_host, position
from mpcli.ranks import Ranks, lost_peer, timed_out
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.records import Heartbeat, RankFailure, StepRecord
from mpcli.rundir import RunDirectory
from tests.small import run_small, small_recipe


def problem(message):
    empty = dict.fromkeys(("file", "line", "column", "path", "hint", "finding"))
    return {**empty, "message": message, "severity": "error"}


def failed(rank, message="KeyError: 1", code=Exit.BUG, **more):
    about = {"step": 12, "exit_code": code, "problems": (problem(message),)} | more
    return rank, RankFailure(rank=rank, **about)


def lost(rank, **more):
    return failed(rank, "another rank", Exit.DISTRIBUTED, lost_peer=True, **more)


def killed(rank, name="SIGKILL"):
    return rank, RankFailure(rank=rank, step=12, exit_code=6, killed_by=name)


def beats(*ranks, step=12):
    return {r: Heartbeat(rank=r, pid=1, launcher=1, host="here", step=step) for r in ranks}


def test_a_killed_rank_is_the_root_whatever_the_others_say():
    found = dict([lost(0), killed(1), failed(2)])
    assert root_cause(found, beats(0, 1, 2), 3) == "rank 1 was killed by SIGKILL in step 12"


def test_nothing_is_started_again_that_was_told_to_end():
    found = root_cause(dict([killed(1)]), beats(0, 1), 2, asked=signal.SIGTERM)
    assert found.exit_code == Exit.PREEMPTED


def test_a_rank_that_hangs_is_told_also_where_the_run_was_told_to_end():
    found = root_cause({0: lost(0, timed_out=True)[1]}, beats(0, 1), 2, asked=signal.SIGTERM)
    assert found.exit_code == Exit.DISTRIBUTED


def test_a_failure_of_ones_own_is_the_root_of_lost_peers():
    found = root_cause(dict([lost(0, timed_out=True), failed(1)]), beats(0, 1), 2)
    assert found.exit_code == Exit.BUG
    assert found.problems[0].what == "rank 1 in step 12: KeyError: 1"


def test_what_all_say_is_said_once_without_a_rank():
    told = [failed(rank, "no such data", Exit.ENVIRONMENT) for rank in (0, 1)]
    found = root_cause(dict(told), beats(0, 1), 2)
    assert (found.exit_code, found.problems[0].what) == (Exit.ENVIRONMENT, "no such data")


def test_ranks_that_say_nothing_when_others_waited_in_vain_hang():
    found = root_cause(dict([lost(0, timed_out=True), lost(2)]), beats(0, 1, 2), 4)
    assert found.exit_code == Exit.DISTRIBUTED
    assert found.problems[0].what.startswith(
        "rank 1 hangs in step 12, rank 3 hangs before step 1: rank 0 waited"
    )


def test_a_hanging_rank_that_the_agent_told_to_end_was_not_preempted():
    told_to_end = RankFailure(rank=1, step=0, exit_code=75, status="preempted")
    found = root_cause({0: lost(0, timed_out=True)[1], 1: told_to_end}, beats(0, 1), 2)
    assert found.exit_code == Exit.DISTRIBUTED
    assert found.problems[0].what.startswith("rank 1 hangs in step 12: rank 0 waited")


def test_lost_peers_alone_start_again():
    assert (
        root_cause(dict([lost(0), lost(1)]), beats(0, 1), 2) == "rank 0 in step 12 lost the others"
    )


@pytest.mark.parametrize(("status", "code"), [("preempted", 75), ("interrupted", 130)])
def test_a_rank_that_was_told_to_end_before_training_ends_the_run(status, code):
    stopped = RankFailure(rank=1, step=0, status=status, exit_code=code)
    found = root_cause({1: stopped}, beats(0, 1, step=0), 2)
    assert (found.status, found.exit_code) == (status, code)


def test_errors_of_gloo_are_lost_peers_and_others_are_not():
    closed = RuntimeError("[/gloo/transport/tcp/pair.cc:545] Connection closed by peer [::1]:1")
    late = RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms")
    assert (lost_peer(closed), timed_out(closed)) == (True, False)
    assert (lost_peer(late), timed_out(late)) == (True, True)
    assert not lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not timed_out(ValueError("timed out"))


TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[07-09,12],other",
}  # fmt: skip


def test_position_in_a_group_of_torchrun():
    found = position(TORCHRUN)
    assert (found.rank, found.world_size, found.local_rank) == (3, 8, 1)
    assert (found.host, found.port, found.agent, found.restarts) == ("node1", 29500, True, 2)


def test_position_in_a_group_of_srun():
    found = position(SRUN)
    assert (found.rank, found.world_size, found.local_rank) == (3, 8, 1)
    assert (found.host, found.port, found.agent) == ("node07", 23456, False)
    assert position(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}).port == 5


@pytest.mark.parametrize(
    ("group", "other"),
    [
        (TORCHRUN, {"TORCHELASTIC_RESTART_COUNT": "3"}),
        (TORCHRUN, {"TORCHELASTIC_RUN_ID": "y"}),
        (SRUN, {"SLURM_JOB_ID": "123457"}),
        (SRUN, {"SLURM_STEP_ID": "1"}),
    ],
)
def test_a_group_that_is_started_again_has_a_place_of_its_own_in_the_store(group, other):
    assert position(group).attempt_key != position(group | other).attempt_key
    assert position(group).attempt_key == position(group | {"RANK": "4"}).attempt_key


def test_a_process_is_alone_without_a_group():
    assert position({}) is None
    assert position({"RANK": "0"}) is None
    assert position({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None  # sbatch's own script
    assert position(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "`MASTER_ADDR` is not set"),
        (TORCHRUN | {"RANK": "8"}, "this process has rank 8, and the group 8 processes"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "`MASTER_PORT` is 99999, which is no port"),
        (TORCHRUN | {"RANK": "first"}, "`RANK` is `first`"),
    ],
)
def test_half_a_position_is_refused(environment, says):
    with pytest.raises(UserError, match=says):
        position(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("a,b", "a"), ("node[3,5-7]", "node3"), ("n[01-03]-ib,x", "n01-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_ranks_but_the_first_write_only_what_is_about_themselves(tmp_path):
    run, _ = run_small(tmp_path)
    other = RunDirectory.join(run.path, 1, 1)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    (row, *_) = RunDirectory.read(run.path).steps()
    other.append_steps([row])
    other.write_observed({})
    assert other.cut(2, 0) == 2
    other.sync()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert other.log_path.name == "log.rank1.txt"
    assert isinstance(row, StepRecord)


def test_a_heartbeat_is_whole_json_of_the_same_length_at_every_step(tmp_path):
    run, _ = run_small(tmp_path)
    rank = RunDirectory.join(run.path, 1, 1)
    rank.begin_heartbeat()
    path = run.path / "attempts/1/rank1.json"
    sizes = set()
    for step in (1, 10, 10**9):
        rank.at_step(step)
        sizes.add(path.stat().st_size)
        assert json.loads(path.read_text())["step"] == step
    rank.end_heartbeat()
    assert len(sizes | {path.stat().st_size}) == 1
    beat = rank.heartbeats()[1]
    assert (beat.pid, beat.state) == (os.getpid(), "ended")


def test_facts_name_the_value_that_differs(tmp_path):
    run, _ = run_small(tmp_path)
    one, other = (
        facts(small_recipe(tmp_path, f"optim.lr={lr}").recipe, run.plan()) for lr in (0.1, 0.2)
    )
    assert {name for name in one if one[name] != other[name]} == {"optim.lr"}
    assert {"python", "torch", "numpy", "transformers", "plan.world_size"} <= one.keys()
    assert "plan.warnings" not in one  # which count the CPUs of a machine


def test_a_rank_takes_part_in_the_attempt_that_it_is_told(tmp_path):
    run, _ = run_small(tmp_path)
    assert RunDirectory.join(run.path, 7, 1).attempt_path == run.path / "attempts/7"


def test_what_stands_in_the_way_of_taking_part_is_told(tmp_path):
    run, _ = run_small(tmp_path)
    rank = RunDirectory.join(run.path, 1, 1)
    assert worker._failed(rank, LookupError("nothing there")) == Exit.BUG
    failure = rank.failures()[1]
    assert failure.problems[0]["message"] == "LookupError: nothing there"
    assert failure.traceback
    shutil.rmtree(rank.attempt_path)
    assert worker._failed(rank, user_error("no room", exit_code=Exit.STORAGE)) == 7


def test_a_process_lives_until_it_was_waited_for(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])
    for name in (None, "waitid"):
        if name:
            monkeypatch.delattr(os, name)
        assert _lives(child.pid)
    child.kill()
    child.wait()
    assert not _lives(child.pid)
    monkeypatch.undo()
    assert not _lives(child.pid)


def test_a_group_of_one_has_a_gpu_of_its_own():
    assert Ranks().device("cuda") == torch.device("cuda")
    assert Ranks(local_rank=0, control=object()).device("cuda") == torch.device("cuda", 0)
    assert Ranks(local_rank=3, control=object()).device("cpu") == torch.device("cpu")


def test_facts_change_with_the_code(tmp_path, monkeypatch):
    run, _ = run_small(tmp_path)
    recipe, plan = small_recipe(tmp_path).recipe, run.plan()
    one = facts(recipe, plan)
    assert facts(recipe, plan) == one
    package = tmp_path / "mpcli"
    shutil.copytree(Path(mpcli.__file__).parent, package)
    monkeypatch.setattr(mpcli, "__file__", str(package / "__init__.py"))
    assert facts(recipe, plan) == one
    with (package / "engines" / "ddp.py").open("a") as file:
        file.write("# another line")
    other = facts(recipe, plan)
    assert {name for name in one if one[name] != other[name]} == {"the SHA-256 of mptrain's code"}


def test_facts_have_the_plugin(tmp_path):
    run, _ = run_small(tmp_path)
    one, other = (facts(small_recipe(tmp_path).recipe, run.plan(), sha) for sha in ("a", "b"))
    assert {name for name in one if one[name] != other[name]} == {"the plug-in's SHA-256"}


def test_ranks_that_plan_for_themselves_take_the_smallest_micro_batch(tmp_path):
    run, _ = run_small(tmp_path)
    plans = [run.plan().model_copy(update={"micro_batch_size": size}) for size in (8, 2, 4)]

    class Gathering(Ranks):
        def gathered(self, value):
            return plans

    assert agreed(Gathering(), plans[0]) == plans[1]


def test_a_rank_without_memory_is_the_root_and_says_what_to_make_smaller():
    full = problem("out of memory: x") | {
        "path": "train.micro_batch_size", "finding": "out-of-memory",
    }  # fmt: skip
    found = root_cause(
        dict([lost(0), failed(1, code=Exit.ENVIRONMENT, problems=(full,))]), beats(0, 1), 2
    )
    assert found.too_large.what == "rank 1 in step 12: out of memory: x"
    before = full | {"path": "engine.device"}  # before the first step
    found = root_cause(dict([failed(1, problems=(before,))]), beats(0, 1), 2)
    assert found.too_large is None
