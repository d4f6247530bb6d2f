"""SIGTERM, Ctrl-C and SIGUSR1: noted at once, obeyed where nothing is torn by it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)

_asked: int | None = None  # the first signal to end
_save_asked = False  # by SIGUSR1
_holds = 0  # blocks that signals wait for
_shared = False  # whether they are obeyed by several processes together
_leave: Callable[[bool], NoReturn] | None = None


class Stopped(KeyboardInterrupt):
    """SIGTERM or the first Ctrl-C: whatever lets Ctrl-C through lets this through.

    A plain `KeyboardInterrupt` is a second Ctrl-C, which waited for nothing.

    Args:
        agreed: all processes that train together stop here.
    """

    def __init__(self, number: int, *, agreed: bool = False) -> None:
        super().__init__()
        self.preempted = number == signal.SIGTERM
        self.agreed = agreed


def install(leave: Callable[[bool], NoReturn] | None = None) -> None:
    """Handle the signals from now on, unless the process was told to do otherwise with them.

    Imports nothing that takes time: call it before what does.

    Args:
        leave: ends the process wherever no block holds signals, given whether it is preempted.
            Without it they raise `Stopped` there, which a half imported module may swallow.
    """
    global _holds, _leave
    _holds, _leave = 0, leave
    _forget()
    for number in _NUMBERS:
        if signal.getsignal(number) in _DEFAULTS:
            signal.signal(number, _note)


def ignore() -> None:
    """For a process that has its exit code and only has to leave."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def blocked() -> Iterator[None]:
    """Keep the signals from processes that are forked in this block, for their whole life."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Let them reach a process that was forked in `blocked` after all."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)


def end_with_parent() -> None:
    """Be killed when the process that started this one is gone, however it ended. Linux only."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


@contextmanager
def handled() -> Iterator[None]:
    """`install` for a block, where nobody did, in the main thread of some other program."""
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    if _note in before.values():
        yield
        return
    try:
        install()
    except ValueError:  # not the main thread: signals are the business of another
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not one of Python's
                signal.signal(number, handler)
        _forget()  # whoever trains next in this program was not asked to end


@contextmanager
def held() -> Iterator[None]:
    """Let signals wait, for `check` or for ever."""
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1


@contextmanager
def released() -> Iterator[None]:
    """Within `held`: `Stopped` ends this block wherever it is."""
    global _holds, _leave
    check()
    before, _holds, _leave = (_holds, _leave), 0, None
    try:
        yield
    except Exception:
        check()  # libraries turn what is raised in them into errors of their own
        raise
    finally:
        _holds, _leave = before


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put signals off to the end of the block; a second Ctrl-C is not waited for.

    For imports: numpy and scipy may swallow a `KeyboardInterrupt` while they are half imported,
    and fail in strange ways afterwards.
    """
    if _leave and not _holds:  # nothing is raised that could be swallowed
        yield
        return
    with handled():
        with held():
            yield
        if not _holds:
            check()


@contextmanager
def shared() -> Iterator[None]:
    """`check` ends nothing in this block: several processes agree on what `asked` says."""
    global _shared
    before, _shared = _shared, True
    try:
        yield
    finally:
        _shared = before


def asked() -> int | None:
    """The first signal to end that came, if any did."""
    return _asked


def check() -> None:
    """End here if a signal is waiting.

    Raises:
        Stopped: at a place where the caller's state is whole.
    """
    if _asked is not None and not _shared:
        raise Stopped(_asked)


def save_asked() -> bool:
    """Whether SIGUSR1 came since this was asked last."""
    global _save_asked
    asked, _save_asked = _save_asked, False
    return asked


def _forget() -> None:
    global _asked, _save_asked
    _asked, _save_asked = None, False


def _note(number: int, frame: FrameType | None) -> None:
    global _asked, _save_asked
    if number == signal.SIGUSR1:
        _save_asked = True
        return
    again, _asked = _asked is not None, _asked or number
    if again and number == signal.SIGTERM:
        return  # it may come many times and means no more by it
    if _holds == 0 and _leave:
        _leave(_asked == signal.SIGTERM)
    if again:
        raise KeyboardInterrupt
    if not _holds:
        check()
