"""Findings of `mptrain diagnose` for a person with ten seconds: cause, layer, numbers, fix."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from mpcli.cli.console import write
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


def show_findings(causes: Sequence[Finding], margins: Mapping[str, float | None]) -> None:
    """Print every cause, and what follows from it; where there is no trouble, the margins."""
    for cause in causes:
        _show(cause)
    if not any(cause.severity != "info" for cause in causes):
        write("no problem found")
        for name, label in _MARGINS.items():
            if (value := margins[name]) is not None:
                is_share = name in ("flushed_share", "skip_rate")
                write(f"  {share_text(value) if is_share else f'{value:.1f}':>7}  {label}")
        write("")


def show_next(causes: Sequence[Finding], command: Sequence[str], *, verified: bool) -> None:
    """Say the command that tries and writes the fixes, where there are any for a recipe.

    Args:
        command: that was given, without options that only change how it is shown.
    """
    if any(cause.suggestion and cause.suggestion.set for cause in causes):
        options = [*([] if verified else ["--verify"]), "--fix", "fixed.yaml"]
        what = "writes the repaired recipe" if verified else "tries the fix and writes the recipe"
        write(visible(f"{shlex.join([*command, *options])}\n  {what}"), sys.stderr)


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
        _say("tried", f"{tried.suggestion.what}: {_outcome(tried)}")
    if cause.suggestion:
        _show_fix(cause.suggestion, cause.verified)
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


def _outcome(tried: Verification) -> str:
    return f"{'it helps' if tried.fixed else 'it does not help'}: {tried.why}"


def _say(label: str, text: str, *, whole: bool = False) -> None:
    """A labelled paragraph, in the width of the terminal; `whole`: to be copied, in one line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    label = f"  {label:{_LABEL}}"
    if whole:
        write(visible(label + text))
        return
    lines = textwrap.wrap(
        visible(text), max(width - len(label), 20), break_long_words=False, break_on_hyphens=False
    )
    write(f"\n{' ' * len(label)}".join([label + (lines or [""])[0], *lines[1:]]))
