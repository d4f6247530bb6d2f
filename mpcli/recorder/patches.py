"""Attributes of others' objects that are replaced for the time of one step, and put back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_MISSING = object()

Around = Callable[..., Any]
"""Called with the original and its arguments; calls it once and returns what it returned."""


@contextlib.contextmanager
def replaced(owner: Any, name: str, around: Around, only: Any = None) -> Iterator[None]:
    """In the block, `owner.name(...)` is `around(original, ...)`.

    Only for this thread, and not inside of a backward: there nobody's loop calls anything, but
    activation checkpointing does.

    Args:
        owner: an instance, a module or a class.
        only: of a class, the instance that is meant. An attribute of the instance itself would be
            copied with it, by `copy.deepcopy` for an average of the weights, say.
    """
    own = vars(owner).get(name, _MISSING)
    original = getattr(owner, name)
    thread = threading.get_ident()
    entered = True

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not entered or threading.get_ident() != thread or in_backward():
            return original(*args, **kwargs)
        if only is not None:
            if args[0] is not only:
                return original(*args, **kwargs)
            return around(original.__get__(only), *args[1:], **kwargs)
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        entered = False  # somebody may have kept the wrapper
        if vars(owner).get(name) is wrapper:
            delattr(owner, name) if own is _MISSING else setattr(owner, name, own)


def in_backward() -> bool:
    """Whether this thread runs a node of a backward."""
    return torch._C._current_graph_task_id() != -1


def defining_class(instance: object, name: str) -> type:
    """The class of an instance that a method comes from."""
    return next(kind for kind in type(instance).__mro__ if name in vars(kind))


def function_of(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what a method does: `copy.deepcopy` leaves functions as they are."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return function
