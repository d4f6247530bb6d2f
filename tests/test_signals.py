"""Signals are noted at once and obeyed where they may be."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NoReturn

import pytest

from mpcli import signals
from mpcli.signals import Stopped, check, handled, held, released, uninterrupted

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture(autouse=True)
def _handled() -> Iterator[None]:
    with handled():
        yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signals.asked() is None
    assert not signals.save_asked()


@BOTH
def test_a_signal_ends_what_is_not_held(number: int) -> None:
    with pytest.raises(Stopped) as caught:
        signal.raise_signal(number)
    assert caught.value.preempted == (number == signal.SIGTERM)


@BOTH
def test_a_held_signal_waits_for_a_check(number: int) -> None:
    with held():
        check()
        signal.raise_signal(number)
        with pytest.raises(Stopped):
            check()


@BOTH
def test_a_released_block_within_a_held_one_ends_where_it_is(number: int) -> None:
    with held():
        with pytest.raises(Stopped), released():
            signal.raise_signal(number)
        with pytest.raises(Stopped), released():
            raise AssertionError("a signal that came before does not let it begin")


def test_a_signal_to_save_is_told_once_and_not_to_who_comes_later() -> None:
    signal.raise_signal(signal.SIGUSR1)
    assert signals.save_asked()
    assert not signals.save_asked()
    signal.raise_signal(signal.SIGUSR1)


def test_a_second_ctrl_c_is_not_held() -> None:
    with held():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Stopped)


def test_ctrl_c_after_sigterm_waits_for_nothing_and_sigterm_again_means_nothing() -> None:
    with held():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@BOTH
def test_imports_are_not_interrupted(number: int) -> None:
    reached = []
    with pytest.raises(Stopped), uninterrupted():
        signal.raise_signal(number)
        reached.append(1)
    assert reached == [1]
    with held(), uninterrupted():  # the one who holds decides
        pass


def test_a_signal_that_the_process_was_told_to_ignore_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for `command &`
    try:
        signals.install()
        signal.raise_signal(signal.SIGINT)
        check()
    finally:
        signal.signal(signal.SIGINT, before)


@BOTH
def test_a_command_is_left_at_once_unless_a_block_holds(number: int) -> None:
    class Left(BaseException):
        pass

    def leave(preempted: bool) -> NoReturn:
        raise Left(preempted)

    signals.install(leave)
    with pytest.raises(Left) as caught, uninterrupted():
        signal.raise_signal(number)
    assert caught.value.args == (number == signal.SIGTERM,)
    signals.install(leave)
    with held():
        signal.raise_signal(number)
        with pytest.raises(Stopped), released():
            pass
    signals.install()
