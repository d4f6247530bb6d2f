"""Where the launchers of several machines meet, and what the first of them tells the others."""

from __future__ import annotations

import datetime
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mpcli import signals
from mpcli.ranks import differences
from mpcli.recipe.errors import Exit, Problem, UserError, user_error

_LAUNCHERS = "mptrain/launchers"
_LOOK = 0.2
_ARRIVE = 900.0
"""Seconds that launchers wait for each other at the beginning, as torch's rendezvous does."""
_CHIEF = "the launcher that leads the run"
_DEPART = 60.0
"""Seconds that the first one waits for the others at the end of an attempt."""


class Meeting:
    """The launchers of a run. The first to come is the chief, who makes the run directory.

    The store lives as long as the run does, in the launcher on the machine of the endpoint.

    Attributes:
        is_chief: whether this is the first.
        is_local: whether all of them are on one machine.
    """

    def __init__(self, endpoint: str, nodes: int, facts: Mapping[str, str]) -> None:
        self.endpoint, self.nodes = endpoint, nodes
        self._facts = facts
        host, _, port = endpoint.rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) < 65536):
            raise user_error(
                f"--rdzv-endpoint {endpoint}: not HOST:PORT",
                "name one of the machines and a free port there, such as `node1:29400`",
            )
        self.is_local = host in ("localhost", "127.0.0.1")
        self._store, self._hosts = _store(host, int(port))
        node = self._store.add(_LAUNCHERS, 1) - 1
        self._store.set(f"mptrain/facts/{node}", json.dumps(dict(facts)))
        if node >= nodes:
            raise user_error(f"{node + 1} launchers came to {endpoint}, and `--nodes` is {nodes}")
        self.is_chief = node == 0
        self._round = 0

    def gather(self) -> None:
        """Wait, as the chief, until all have come.

        Raises:
            UserError: exit 6, they did not; 2, one of them is to train something else.
            Stopped: by a signal in the meantime.
        """
        with _reached("the machine of the endpoint"):
            have_come = self._wait(
                lambda: self._store.add(_LAUNCHERS, 0) >= self.nodes, _ARRIVE, after_signal=0
            )
        if not have_come:
            signals.check()
            raise user_error(
                f"not all of the {self.nodes} launchers came to {self.endpoint}",
                "start `mptrain run` with the same options on each machine",
                exit_code=Exit.DISTRIBUTED,
            )

        with _reached("the machine of the endpoint"):
            others = [self._store.get(f"mptrain/facts/{node}") for node in range(1, self.nodes)]
        for node, theirs in enumerate(others, 1):
            whose = "the first launcher", f"launcher {node + 1}"
            if told := differences(self._facts, json.loads(theirs), whose):
                hint = "start `mptrain run` with the same options and versions on each machine"
                raise UserError(*(Problem(what, hint) for what in told))

    def tell(self, **order: Any) -> None:
        """Tell the others, as the chief, what is next.

        Raises:
            UserError: exit 6, they cannot be reached.
        """
        self._round += 1
        with _reached("the machine of the endpoint"):
            self._store.set(f"mptrain/order/{self._round}", json.dumps(order))

    def dismiss(self, exit_code: int, reason: str | None) -> None:
        """Tell the others, as the chief, that the run is over, and why if it is not done."""
        with suppress(UserError):  # they know
            self.tell(exit_code=exit_code, reason=reason)

    def order(self) -> dict[str, Any]:
        """What the chief tells next.

        Raises:
            UserError: exit 6, it is gone.
            Stopped: by a signal, and the chief says nothing.
        """
        self._round += 1
        key = f"mptrain/order/{self._round}"
        # It waits for the others itself. It knows of a signal if processes of a run got it.
        seconds, patience = (_ARRIVE, 0.0) if self._round == 1 else (_DEPART, _DEPART)
        with _reached(_CHIEF):
            told = self._wait(
                lambda: bool(self._store.check([key])), seconds + _DEPART, after_signal=patience
            )
            if not told:
                self._store.add(_LAUNCHERS, -1)  # it may come again
                signals.check()
                raise _gone(_CHIEF)
            order: dict[str, Any] = json.loads(self._store.get(key))
        return order

    def finished(self) -> None:
        """Wait, as the chief, until the others' processes of this attempt are gone too.

        Raises:
            UserError: exit 6, a launcher does not say so.
        """
        key = f"mptrain/done/{self._round}"
        with _reached("the machine of the endpoint"):
            self._store.add(key, 1)
            all_are = not self.is_chief or self._wait(
                lambda: self._store.add(key, 0) >= self.nodes, _DEPART
            )
        if not all_are:
            raise _gone("the launcher of a machine")

    def leave(self) -> None:
        """Part from the others; the host of the store is the last to go."""
        try:
            self._store.add("mptrain/left", 1)
            if self._hosts:
                self._wait(lambda: self._store.add("mptrain/left", 0) >= self.nodes, 10)
        except RuntimeError:
            return

    @staticmethod
    def _wait(
        happened: Callable[[], bool], seconds: float, after_signal: float = float("inf")
    ) -> bool:
        """Whether something came about in a time, and in another one after a signal to end."""
        end, asked = time.monotonic() + seconds, False
        while not happened():
            now = time.monotonic()
            if signals.asked() is not None and not asked:
                end, asked = min(end, now + after_signal), True
            if now >= end:
                return False
            time.sleep(_LOOK)
        return True


@contextmanager
def _reached(who: str) -> Iterator[None]:
    """What the store raises means that somebody is gone."""
    try:
        yield
    except RuntimeError as error:
        raise _gone(who) from error


def _gone(who: str) -> UserError:
    return user_error(
        f"{who} is gone",
        "`mptrain run --resume` on all machines goes on from the newest checkpoint",
        exit_code=Exit.DISTRIBUTED,
    )


def _store(host: str, port: int) -> tuple[TCPStore, bool]:
    """The store at an endpoint, and whether it is in this process."""
    limit = datetime.timedelta(seconds=_ARRIVE)
    for is_master in (True, False) if _is_here(host) else (False,):
        try:
            store = TCPStore(
                host,
                port,
                None,
                is_master=is_master,
                timeout=limit,
                wait_for_workers=False,
                multi_tenant=True,  # torch's rendezvous uses the same endpoint
            )
            return store, is_master
        except RuntimeError as error:
            if not is_master:  # another launcher on this machine may have been earlier
                raise user_error(
                    f"--rdzv-endpoint {host}:{port}: {str(error).splitlines()[0]}",
                    "name one of the machines and a free port there",
                    exit_code=Exit.DISTRIBUTED,
                ) from error
    raise AssertionError


def _is_here(host: str) -> bool:
    """Whether a name or an address is of this machine: a socket can be bound to it."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise user_error(f"--rdzv-endpoint: `{host}`: {error.strerror}") from error
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
                return True
            except OSError:
                continue
    return False
