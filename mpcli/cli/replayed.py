"""A step that was run again, as tables: what tells most; `--json` has all of it."""

from __future__ import annotations

import math

from mpcli.cli.console import show_table
from mpcli.cli.evidence import number_text, origin_text, share_text, show
from mpcli.records import NonFiniteOrigin, Replay, ReplayedModule, ShadowComparison


def show_replay(replay: Replay) -> None:
    """Print what running a step again showed, on stdout."""
    start = "fresh weights" if replay.checkpoint is None else f"checkpoint {replay.checkpoint}"
    between = f", steps run again: {replay.steps_again}" if replay.steps_again else ""
    rows = [
        ("step", f"{replay.step}, {replay.why}"),
        ("from", f"{start}{between}"),
        ("precision", f"{replay.mode}, scale {number_text(replay.scale)}"),
        ("loss", f"{number_text(replay.loss)}, recorded {number_text(replay.recorded_loss)}"),
        ("NaN or infinity", _origin(replay.origin)),
    ]
    if replay.micro_batches > 1:
        own = number_text(replay.shadow_losses.get("run"))
        part = f"micro-batch {replay.micro_batch + 1} of {replay.micro_batches}"
        rows.append(("compared", f"{part}, its share of the loss {own}"))
    for name, origin in replay.shadow_origins.items():
        loss = number_text(replay.shadow_losses.get(name))
        rows.append((f"in {name}", f"loss {loss}, {_origin(origin)}"))
    if parting := replay.parting:
        place = f"{parting.module or 'the model'}, {parting.phase}"
        rows.append(("parts from fp32", f"in {place}, error {parting.error:.1e}"))
    if replay.nondeterministic:
        rows.append(("not repeatable", ", ".join(replay.nondeterministic)))
    if replay.flight_differs:
        rows.append(("as the run kept it", ", ".join(replay.flight_differs)))
    if not replay.same_random_numbers:
        rows.append(("random numbers", "not those of the run in the shadows"))
    show_table(f"Step {replay.step} again", ("", ""), rows)
    header = ("module", "output: error", "to zero", "over", "gradient: error", "to zero", "over")
    show("Beside fp32", header, map(_module, sorted(replay.modules, key=_difference)))


def _origin(origin: NonFiniteOrigin | None) -> str:
    return "none" if origin is None else origin_text(origin)


def _difference(module: ReplayedModule) -> float:
    """Sorts what is farthest from fp32 first."""
    errors = [seen.error for seen in (module.output, module.grad_output) if seen]
    return -max([math.inf if math.isnan(error) else error for error in errors], default=0.0)


def _module(module: ReplayedModule) -> tuple[str, ...]:
    name = module.module or "(the model)"
    call = f" #{module.call}" if module.call else ""
    return (f"{name}{call}", *_compared(module.output), *_compared(module.grad_output))


def _compared(seen: ShadowComparison | None) -> tuple[str, str, str]:
    if seen is None:
        return "-", "-", "-"
    return f"{seen.error:.1e}", share_text(seen.flushed), share_text(seen.overflowed)
