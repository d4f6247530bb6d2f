"""mptrain: mixed-precision training that explains itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpcli.recorder import HFRecorder as HFRecorder
    from mpcli.recorder import Recorder as Recorder

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The recorders, when they are asked for: the command line starts without torch (PEP 562)."""
    if name in ("HFRecorder", "Recorder"):
        from mpcli import recorder

        return getattr(recorder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
