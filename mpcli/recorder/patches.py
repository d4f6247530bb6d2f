"""Functions of others that are watched for the time of one step, and put back.

What they do is not touched: they get the arguments they are called with, once, and what they return
or raise is what the loop gets. A failure of the watcher is told and ends no training.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

logger = logging.getLogger("mpcli.recorder")

MAX_TOLD = 3
"""Failures of one recorder that are told; it would be the same one, in every step."""

After = Callable[[Any], None] | None
Before = Callable[..., After]
"""Called with a function's arguments, before it; returns what to call with its result, or None."""

_MISSING = object()


class Failures:
    """Tells what a recorder could not do, while the training goes on.

    Attributes:
        saw_compiling: whether a hook was met by code that was being compiled.
    """

    def __init__(self) -> None:
        self.saw_compiling = False
        self._count = 0

    def tell(self) -> None:
        """Log the exception that is being handled, the first few times."""
        self._count += 1
        level = logging.ERROR if self._count <= MAX_TOLD else logging.DEBUG
        message = "something could not be recorded; the training goes on"
        logger.log(level, message, exc_info=True)

    def safe(self, function: Callable[..., Any]) -> Callable[..., None]:
        """A hook that does what `function` does, without a result and without failing.

        It is a plain function, which `copy.deepcopy` of what it hangs on leaves as it is. In code
        that is being compiled it is nothing.
        """

        def hook(*args: Any) -> None:
            if torch.compiler.is_compiling():
                self.saw_compiling = True  # done by the code that is made
                return
            try:
                function(*args)
            except Exception:
                self.tell()

        return hook


@contextlib.contextmanager
def watched(
    owner: Any, name: str, before: Before, failures: Failures, only: Any = None
) -> Iterator[None]:
    """In the block, `before` is called before every `owner.name(...)`.

    Only for this thread, and not inside of a backward: there no loop calls anything, but activation
    checkpointing does.

    Args:
        owner: an instance, a module or a class.
        only: of a class, the instance that is meant, which `before` does not get. An attribute of
            the instance itself would be copied with it, for an average of the weights, say.
    """
    own = vars(owner).get(name, _MISSING)
    original = getattr(owner, name)
    thread = threading.get_ident()
    entered = True

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        is_other = only is not None and args[0] is not only
        if not entered or is_other or threading.get_ident() != thread or in_backward():
            return original(*args, **kwargs)
        after = None
        try:
            after = before(*(args if only is None else args[1:]), **kwargs)
        except Exception:
            failures.tell()
        result = original(*args, **kwargs)
        if after is not None:
            failures.safe(after)(result)
        return result

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
