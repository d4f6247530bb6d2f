"""The processes that train one run together, and what they agree on.

Every decision that changes what a run computes has to be the same in all of them at the same step:
one that leaves the loop alone lets the others wait for ever. What follows from the rows of the
steps is the same anyway; what does not (signals, clocks) goes through `Ranks.agree`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup

from mpcli.position import Position
from mpcli.recipe.errors import Problem, UserError

T = TypeVar("T")


class Ask:
    """What one rank may want that all have to do, as bits of a number."""

    NOTHING = 0
    TERMINATE = 1
    INTERRUPT = 2
    SAVE = 4
    EVALUATE_BY_TIME = 8
    SAVE_BY_TIME = 16
    COLLECT = 32
    STOP = TERMINATE | INTERRUPT
    ANYTHING = 63


class Ranks:
    """This process among those that train a run together.

    Made without arguments it is alone, and nothing waits for anybody.

    Attributes:
        rank: its number, from 0; rank 0 writes the run's records.
        world_size: how many there are.
        local_rank: its number on its machine.
        timeout: seconds that one waits for the others.
        store: in which they met; what rank 0 hosts lives as long as this.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        control: ProcessGroup | None = None,
        store: TCPStore | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.timeout = timeout
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.store = store
        self._control = control  # gloo: what it carries is on the host
        self._asked: tuple[dist.Work, Tensor] | None = None
        self._kept = Ask.NOTHING

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world_size == 1

    def device(self, kind: str) -> torch.device:
        """This rank's device of a kind: `cpu` or `cuda`."""
        if self._control is None or kind != "cuda":  # a group of one has a GPU too
            return torch.device(kind)
        return torch.device(kind, self.local_rank)

    def agree(self, ask: int, now: int = Ask.ANYTHING) -> int:
        """What any rank asked for, the same in all of them. All have to call it equally often.

        Alone, that is `ask`. Otherwise it is what was asked in the call before this one, so that
        nobody waits for a message.

        Args:
            now: what the caller can do here; the rest is kept for a later call.
        """
        if self.alone:
            return ask
        sent = torch.tensor([ask], dtype=torch.int32)
        work = dist.all_reduce(sent, dist.ReduceOp.BOR, self._control, async_op=True)
        before, self._asked = self._asked, (work, sent)
        if before is not None:
            before[0].wait()
            self._kept |= int(before[1])
        found, self._kept = self._kept & now, self._kept & ~now
        return found

    def from_main(self, value: T) -> T:
        """Rank 0's value, in every rank. All have to call it."""
        if self.alone:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        found: T = box[0]
        return found

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, by rank, in every rank. All have to call it."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def same(self, number: int) -> bool:
        """Whether it is the same number in all ranks, which wait on the host. All have to call it.

        Args:
            number: below 2**63.
        """
        if self.alone:
            return True
        ends = torch.tensor([number, -number])
        dist.all_reduce(ends, dist.ReduceOp.MAX, self._control)
        return bool(ends[0] == -ends[1])

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor on the run's device over the ranks, in place; nobody waits on the host."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def new_group(self) -> ProcessGroup:
        """Another group of all ranks on the run's device, for a library. All have to call it."""
        group = dist.new_group(timeout=_limit(self.timeout, on_gpus=dist.get_backend() == "nccl"))
        assert isinstance(group, ProcessGroup)
        return group

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if not self.alone:
            dist.barrier(self._control)


ALONE = Ranks()


def join(
    position: Position, device: torch.device, timeout: float, facts: Mapping[str, str] | None = None
) -> Ranks:
    """Meet the other processes of the group; `leave` parts from them.

    A store prefix per attempt keeps a restarted group from the addresses of the one before it:
    torch's own agent reuses its store, and restarts then hang (seen in torch 2.14 and 2.15).

    Args:
        timeout: seconds that a collective operation may take.
        facts: what has to be the same in all ranks, by name.

    Raises:
        UserError: exit 2, in all ranks, the facts of one are others.
        RuntimeError: they did not come.
    """
    limit = datetime.timedelta(seconds=timeout)
    rank, world_size = position.rank, position.world_size
    hosts = not position.agent and rank == 0
    store = TCPStore(
        position.host, position.port, None, is_master=hosts, timeout=limit, wait_for_workers=False
    )
    own = PrefixStore(position.attempt_key, store)
    _compare(own, rank, world_size, facts or {})
    on_gpus = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        store=own,
        rank=rank,
        world_size=world_size,
        timeout=_limit(timeout, on_gpus=on_gpus),
        device_id=device if on_gpus else None,
    )
    control = dist.new_group(backend="gloo", timeout=limit)
    assert isinstance(control, ProcessGroup)
    return Ranks(rank, world_size, position.local_rank, control, store, timeout)


_WATCHDOG = datetime.timedelta(seconds=30)


def _limit(timeout: float, *, on_gpus: bool) -> datetime.timedelta:
    """NCCL's own watchdog kills the process: the control group is to find it first, and say so."""
    limit = datetime.timedelta(seconds=timeout)
    return limit + _WATCHDOG if on_gpus else limit


_LONGEST_FACT = 80  # characters of one that is told


def _compare(store: PrefixStore, rank: int, world_size: int, facts: Mapping[str, str]) -> None:
    """Rank 0 reads what all say, and all read what it found."""
    store.set(f"facts/{rank}", json.dumps(dict(facts)))
    if rank == 0:
        found: list[str] = []
        for other in range(1, world_size):
            theirs = json.loads(store.get(f"facts/{other}"))
            found += differences(facts, theirs, ("rank 0", f"rank {other}"))
        store.set("differences", json.dumps(found))
    told = json.loads(store.get("differences"))
    if rank == 0:
        for other in range(1, world_size):  # the store ends with rank 0
            store.get(f"read/{other}")
    else:
        store.set(f"read/{rank}", "")
    if told:
        hint = "start all ranks with the same recipe, code and library versions"
        raise UserError(*(Problem(what, hint) for what in told))


_MOST_DIFFERENCES = 8


def differences(
    one: Mapping[str, str], other: Mapping[str, str], whose: tuple[str, str]
) -> list[str]:
    """The first of the facts that are not the same, in words."""
    found = []
    for name in sorted({*one, *other}, key=lambda name: (name not in one, name)):
        values = [known.get(name, "nothing") for known in (one, other)]
        if values[0] != values[1]:
            mine, theirs = _shortened(*values)
            found.append(f"{name} is {mine} in {whose[0]} and {theirs} in {whose[1]}")
    return found[:_MOST_DIFFERENCES]


def _shortened(one: str, other: str) -> tuple[str, str]:
    """The parts of two texts where they differ."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    start = max(0, same - _LONGEST_FACT // 2) if max(len(one), len(other)) > _LONGEST_FACT else 0
    parts = [text[start : start + _LONGEST_FACT] for text in (one, other)]
    return f"`{parts[0]}`", f"`{parts[1]}`"


_LOST = re.compile(r"gloo/|connection (was )?(closed|reset|refused)|connectFullMesh", re.IGNORECASE)
_TIMED_OUT = re.compile(r"time(d)?[ -]?out", re.IGNORECASE)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says only that another rank could not be reached."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def timed_out(error: BaseException) -> bool:
    """Whether another rank could not be reached in the time there is for that."""
    return lost_peer(error) and _TIMED_OUT.search(str(error)) is not None


def leave() -> None:
    """Part from the others; what is on its way to them is lost."""
    if dist.is_initialized():
        dist.destroy_process_group()
