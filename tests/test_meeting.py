"""Launchers of several machines that do not come, are gone, or get a signal while they wait."""

from __future__ import annotations

import json
import signal
import time

import pytest

from mpcli import meeting, signals
from mpcli.elastic import follow, supervise
from mpcli.meeting import Meeting
from mpcli.recipe.errors import Exit, UserError
from tests.small import run_small, small_recipe


class Store:
    """torch's, in this process: nobody else is there."""

    def __init__(self, counts=None):
        self.counts = dict(counts or {})
        self.told = {}
        self.gone = False

    def _reached(self):
        if self.gone:
            raise RuntimeError("Connection reset by peer")

    def add(self, key, amount):
        self._reached()
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    def set(self, key, value):
        self._reached()
        self.told[key] = value

    def check(self, keys):
        self._reached()
        return all(key in self.told for key in keys)

    def get(self, key):
        return self.told[key]


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setattr(meeting, "_store", lambda host, port: (found, True))
    return found


@pytest.fixture
def _asked(monkeypatch):
    with signals.handled():
        monkeypatch.setattr(signals, "_asked", signal.SIGTERM)
        yield


def second(store):
    store.counts["mptrain/launchers"] = 1
    return Meeting("node1:29400", 2, {"optim.lr": "0.1"})


def lead(tmp_path, chief):
    """What the chief writes of a run."""
    small = small_recipe(tmp_path, "engine={kind: ddp, processes: 1, device: cpu}")
    run, _ = run_small(tmp_path)
    plan = run.plan().model_copy(update={"world_size": 2})
    run.begin_attempt(small.recipe, plan, {}, [])
    return supervise(run, small.recipe, plan, {}, print, None, chief)


def test_launchers_that_do_not_come_end_the_run(tmp_path, store, monkeypatch):
    monkeypatch.setattr(meeting, "_ARRIVE", 0.1)
    result = lead(tmp_path, Meeting("node1:29400", 2, {"optim.lr": "0.1"}))
    assert (result.status, result.exit_code) == ("failed", Exit.DISTRIBUTED)
    assert result.reason == "not all of the 2 launchers came to node1:29400"


def test_launchers_that_are_to_train_something_else_end_the_run(tmp_path, store):
    chief = Meeting("node1:29400", 2, {"optim.lr": "0.1"})
    Meeting("node1:29400", 2, {"optim.lr": "0.3"})
    result = lead(tmp_path, chief)
    assert (result.status, result.exit_code) == ("failed", Exit.USAGE)
    assert result.reason == "optim.lr is `0.1` in the first launcher and `0.3` in launcher 2"


def test_a_store_that_is_gone_ends_the_run(tmp_path, store):
    chief = Meeting("node1:29400", 2, {"optim.lr": "0.1"})
    store.gone = True
    assert lead(tmp_path, chief).reason == "the machine of the endpoint is gone"
    for call in (chief.gather, chief.finished, lambda: chief.tell(attempt=1)):
        with pytest.raises(UserError, match="is gone") as raised:
            call()
        assert raised.value.exit_code is Exit.DISTRIBUTED
    chief.dismiss(Exit.DONE, None)
    chief.leave()


@pytest.mark.usefixtures("_asked")
def test_a_chief_that_waits_for_others_obeys_a_signal(tmp_path, store):
    result = lead(tmp_path, Meeting("node1:29400", 2, {"optim.lr": "0.1"}))
    assert (result.status, result.exit_code) == ("preempted", 75)


@pytest.mark.usefixtures("_asked")
def test_a_launcher_that_waits_for_the_chief_obeys_a_signal_and_may_come_again(store):
    assert follow(second(store), 2, None) == (75, None, None)
    assert store.counts["mptrain/launchers"] == 1


@pytest.mark.usefixtures("_asked")
def test_after_a_signal_the_chief_is_waited_for_between_attempts(store):
    other = second(store)
    store.told["mptrain/order/1"] = json.dumps({"attempt": 1})
    store.told["mptrain/order/2"] = json.dumps({"exit_code": 75})
    assert other.order() == {"attempt": 1}
    assert other.order() == {"exit_code": 75}


def test_a_chief_that_says_nothing_is_not_waited_for_for_ever(store, monkeypatch):
    """It was killed, and the store is on another machine."""
    monkeypatch.setattr(meeting, "_DEPART", 0.1)
    other = second(store)
    store.told["mptrain/order/1"] = json.dumps({"attempt": 1})
    other.order()
    with pytest.raises(UserError, match="the launcher that leads the run is gone") as raised:
        other.order()
    assert raised.value.exit_code is Exit.DISTRIBUTED


def test_launchers_are_given_time_to_come_before_the_chief_says_anything(store, monkeypatch):
    monkeypatch.setattr(meeting, "_DEPART", 0.1)
    monkeypatch.setattr(meeting, "_ARRIVE", 0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match="is gone"):
        second(store).order()
    assert time.monotonic() - began >= 0.6
