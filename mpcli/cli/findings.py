"""Findings of `mptrain diagnose` for a person with ten seconds: cause, layer, numbers, fix."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mpcli.cli.console import memory_text, write
from mpcli.cli.evidence import number_text, share_text
from mpcli.diagnose.finding import Finding, Suggestion, Verification
from mpcli.recipe.render import visible

_LABEL = 10  # cells
_LAYERS = 3
_MARGINS = {
    "forward_headroom_bits": "outputs, bits to fp16's overflow",
    "gradient_headroom_bits": "scaled gradients, bits to fp16's overflow",
    "weight_headroom_bits": "weights, bits to fp16's overflow",
    "flushed_share": "gradients that became zero in the step run again",
    "skip_rate": "steps skipped",
}


def show_findings(
    causes: Sequence[Finding], margins: Mapping[str, float | None], without_trouble: str
) -> None:
    """Print every cause, and what follows from it; where there is no trouble, the margins.

    Args:
        without_trouble: says that there is none.
    """
    for cause in causes:
        _show(cause)
    if not any(cause.severity != "info" for cause in causes):
        write(without_trouble)
        for name, label in _MARGINS.items():
            if (value := margins[name]) is not None:
                is_share = name in ("flushed_share", "skip_rate")
                write(f"  {share_text(value) if is_share else f'{value:.1f}':>7}  {label}")
        write("")


def show_facts(place: Path, facts: str) -> None:
    """Print what was seen, in the width of the terminal."""
    write(_wrapped(visible(f"{place}: "), facts, "  "))


def show_command(what: str, command: Sequence[str]) -> None:
    """Say what a command is for, and the command, to be copied, in a line of its own."""
    write(visible(what), sys.stderr)
    write(visible(shlex.join(command)), sys.stderr)


def _show(cause: Finding) -> None:
    where = [", ".join(cause.layers[:_LAYERS]), cause.phase]
    if cause.step is not None:
        where.append(f"step {cause.step:,}")
    more = len(cause.layers) - _LAYERS
    where[0] += f" and {more} more" if more > 0 else ""
    write(visible(f"{cause.severity}: {cause.id}  ({'; '.join(filter(None, where))})"))
    _say("cause", cause.cause)
    if cause.evidence:
        _say("numbers", ", ".join(_numbers(cause.evidence)))
    for tried in cause.tried:
        if not tried.fixed:
            _say("no help", f"{tried.suggestion.what}: {tried.why}")
    if cause.verified is False:
        _say("fix", "none of the suggestions helped")
    elif cause.suggestion:
        _show_fix(cause.suggestion, cause.verified)
    for tried in cause.tried:
        if tried.fixed:
            _say("tried", tried.why)
            _say("cost", _cost(tried))
    if cause.not_tried:
        _say("not tried", cause.not_tried)
    if cause.consequences:
        _say("leads to", ", ".join(dict.fromkeys(found.id for found in cause.consequences)))
    write("")


def _show_fix(suggestion: Suggestion, verified: bool | None) -> None:
    known = {True: " (tried: it helps)", False: " (tried: it does not help)", None: ""}[verified]
    _say("fix", suggestion.what + known)
    for setting in suggestion.set:
        _say("", f"--set {shlex.quote(setting)}", whole=True)
    for number, line in enumerate((suggestion.code or "").splitlines()):
        _say("" if number else "code", line, whole=True)
    if suggestion.arguments:
        given = ", ".join(f"{name}={value!r}" for name, value in suggestion.arguments.items())
        _say("arguments", f"TrainingArguments({given})")


def _numbers(evidence: Mapping[str, float | str | bool | None]) -> Iterable[str]:
    for name, value in evidence.items():
        if value is not None:
            yield f"{name.replace('_', ' ')} {_value(value)}"


def _value(value: float | str | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number_text(value)


def _cost(tried: Verification) -> str:
    if tried.with_it is None:
        return "unknown"
    now, before = tried.with_it, tried.without
    memory = f"{memory_text(now.peak_memory_bytes)} ({memory_text(before.peak_memory_bytes)})"
    seconds = f"{now.seconds_per_step:.3g} s per step ({before.seconds_per_step:.3g})"
    return f"{seconds}, {memory} of tensors; in brackets, without it"


def _say(label: str, text: str, *, whole: bool = False) -> None:
    """A labelled paragraph, in the width of the terminal; `whole`: to be copied, in one line."""
    label = f"  {label:{_LABEL}}"
    write(visible(label + text) if whole else _wrapped(label, text, " " * len(label)))


def _wrapped(label: str, text: str, indent: str) -> str:
    """A paragraph in the width of the terminal; of other streams in one line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    lines = textwrap.wrap(
        visible(text),
        max(width, len(indent) + 20),
        initial_indent=label,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines or [label.rstrip()])
