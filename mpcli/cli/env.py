"""`mptrain env`."""

from __future__ import annotations

from mpcli.cli.console import memory_text, show_table
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson


def env(as_json: AsJson = False) -> None:
    """Show versions, devices and the precisions that run here."""
    from mpcli.machine import environment

    found = environment()
    if as_json:
        write_json({"status": "done", "exit_code": 0, **found})
        return
    show_table(
        "Versions",
        ("", ""),
        [
            ("mptrain", found["mptrain"]),
            ("python", f"{found['python']} on {found['platform']}"),
            *((name, version or "not installed") for name, version in found["versions"].items()),
        ],
    )
    show_table(
        "Devices",
        ("device", "name", "capability", "memory"),
        [
            (d["device"], d["name"], d["capability"], memory_text(d["memory_bytes"]))
            for d in found["devices"]
        ],
    )
    show_table(
        "Precisions",
        ("device", "precision", "", "time of a step over fp32's"),
        [
            (device, precision, _verdict(p), f"{p['relative_time']:.1f}" if p["runs"] else "")
            for device, precisions in found["precisions"].items()
            for precision, p in precisions.items()
        ],
    )
    if found["variables"]:
        show_table("Environment variables", ("", ""), found["variables"].items())


def _verdict(precision: dict[str, object]) -> str:
    if not precision["runs"]:
        return f"not available: {precision['error']}"
    return "native" if precision["native"] else "emulated"
