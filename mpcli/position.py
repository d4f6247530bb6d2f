"""Where a process stands in its group, as torchrun, SLURM or a person's own script say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mpcli.recipe.errors import user_error


@dataclass(frozen=True)
class Position:
    """Where a process stands in its group.

    Attributes:
        local_rank: among the processes of its machine: the number of its GPU.
        host: of the store in which the processes meet.
        attempt_key: differs between two groups that meet in the same store.
        agent: whether the store is the agent's; otherwise rank 0 hosts it.
        restarts: how often the agent started the group again.
        restarts_left: how often it will, should a process fail.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int
    attempt_key: str
    agent: bool = True
    restarts: int = 0
    restarts_left: int = 0


def position(environment: Mapping[str, str]) -> Position | None:
    """The position that the variables of an environment tell; None: the process is alone.

    Raises:
        UserError: exit 2, one of them is missing or says nothing.
    """
    found = _position(environment)
    if found and not found.rank < found.world_size:
        raise user_error(
            f"this process has rank {found.rank}, and the group {found.world_size} processes",
            "ranks are counted from 0",
        )
    if found and not 0 < found.port < 65536:
        raise user_error(f"`MASTER_PORT` is {found.port}, which is no port", "use 1 to 65535")
    return found


def _position(environment: Mapping[str, str]) -> Position | None:
    if "RANK" in environment and "WORLD_SIZE" in environment:
        restarts = _number(environment, "TORCHELASTIC_RESTART_COUNT", "0")
        return Position(
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK", environment["RANK"]),
            host=_text(environment, "MASTER_ADDR"),
            port=_number(environment, "MASTER_PORT"),
            attempt_key=f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{restarts}",
            agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            restarts=restarts,
            restarts_left=_number(environment, "TORCHELASTIC_MAX_RESTARTS", "0") - restarts,
        )
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_ID" not in environment or tasks == "1":
        return None  # sbatch sets variables too, for its script
    job, step = _number(environment, "SLURM_JOB_ID"), environment["SLURM_STEP_ID"]
    host = environment.get("MASTER_ADDR") or first_host(_text(environment, "SLURM_STEP_NODELIST"))
    return Position(
        rank=_number(environment, "SLURM_PROCID"),
        world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        host=host,
        # Jobs that share a machine rarely have numbers that differ by a multiple of this.
        port=_number(environment, "MASTER_PORT", str(20000 + job % 10000)),
        attempt_key=f"{job}.{step}",
        agent=False,
    )


def first_host(nodes: str) -> str:
    """The first machine of SLURM's list.

    >>> first_host("node[01-03,07],other")
    'node01'
    >>> first_host("gpu-a,gpu-b")
    'gpu-a'
    """
    match = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,\[]*)", nodes)
    assert match
    prefix, numbers, suffix = match.groups(default="")
    return prefix + re.split("[-,]", numbers)[0] + suffix


def _text(environment: Mapping[str, str], name: str, default: str | None = None) -> str:
    text = environment.get(name) or default
    if text is None:
        raise user_error(
            f"this process is one of several, and `{name}` is not set",
            "torchrun and srun set it; unset RANK and WORLD_SIZE to start processes from here",
        )
    return text


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = _text(environment, name, default)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise user_error(f"`{name}` is `{text}`, which is no number of a process")
    return int(text)
