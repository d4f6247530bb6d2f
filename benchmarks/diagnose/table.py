"""The benchmark's table, for docs/diagnose.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.diagnose.faults import FAMILIES, FAULTS, Cell, left_out

ROOT = Path(__file__).parents[2]
Scores = Mapping[str, dict[str, Any]]


def write_table(
    page: Path, every: Mapping[str, Cell | str], scores: Scores, healthy: Scores, seed: int
) -> None:
    """Write the table between the page's markers."""
    text = "\n\n".join((
        *_summary(scores, healthy, seed),
        _matrix(every, scores),
        *_misses(scores, healthy),
        *_not_scored(every, scores),
    ))  # fmt: skip
    before = page.read_text("utf-8")
    page.write_text(docs().between(before, "benchmark", f"{text}\n", "make bench-diagnose"))


def docs() -> Any:
    path = ROOT / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _summary(scores: Scores, healthy: Scores, seed: int) -> list[str]:
    outsider = left_out(seed)
    inside = {name: score for name, score in scores.items() if not name.endswith(outsider)}
    outside = {name: score for name, score in scores.items() if name.endswith(outsider)}
    rows = [
        (what, *(_share(group, count) for group in (scores, inside, outside)))
        for what, count in (
            ("class, the first cause", lambda score: score.get("class")),
            ("layer, the first one", lambda score: score.get("layer")),
            ("phase", lambda score: score.get("phase")),
            ("mended by the first suggestion", lambda score: score["patch"] == 1),
            ("mended by one of three suggestions", lambda score: score["patch"] > 0),
        )
    ]
    alarmed = sum(bool(run["alarms"]) for run in healthy.values())
    head = ("", "all", "developed on", f"left out: {outsider}")
    return [
        f"Seed {seed}. {len(_scored(scores))} cells are scored. Healthy runs with a finding of "
        f"level warning or above: {alarmed} of {len(healthy)}.",
        docs().table(head, rows).rstrip(),
    ]


def _scored(scores: Scores) -> list[dict[str, Any]]:
    """A cell that failed counts as one in which nothing is right."""
    failed = {"class": False, "phase": False, "patch": 0, "found": []}
    return [failed | score for score in scores.values() if score["state"] != "harmless"]


def _share(scores: Scores, count: Any) -> str:
    values = [count(score) for score in _scored(scores)]
    known = [value for value in values if value is not None]
    return f"{sum(known)} of {len(known)} ({sum(known) / max(len(known), 1):.0%})"


def _matrix(every: Mapping[str, Cell | str], scores: Scores) -> str:
    """A row for each class; what is wrong stands in its cells."""
    rows = []
    for fault in FAULTS:
        names = [f"{fault}/{family}" for family in FAMILIES]
        rows.append((f"`{fault}`", *(_cell(every[name], scores.get(name)) for name in names)))
    about = (
        "A cell that is all right is `ok`. Otherwise: the cause that was named first, or which of "
        "layer, phase and patch (that no suggestion mended it) is wrong."
    )
    return f"{about}\n\n{docs().table(('', *FAMILIES), rows).rstrip()}"


def _cell(cell: Cell | str, score: dict[str, Any] | None) -> str:
    if isinstance(cell, str):
        return "inapplicable"
    assert score
    if score["state"] != "scored":
        return score["state"]
    if not score["class"]:
        return f"**{(score['found'] or ['nothing'])[0]}**"
    wrong = [what for what in ("layer", "phase") if score.get(what) is False]
    wrong += [] if score["patch"] else ["patch"]
    return f"**{', '.join(wrong)}**" if wrong else "ok"


def _misses(scores: Scores, healthy: Scores) -> list[str]:
    lines = []
    for name, score in scores.items():
        if score["state"] == "failed":
            lines.append(f"- `{name}`: {score['why'].strip().splitlines()[-1]}")
        elif score["state"] == "scored" and not score["class"]:
            lines.append(f"- `{name}`: found {', '.join(score['found']) or 'nothing'}")
        elif score["state"] == "scored" and not score["patch"]:
            tried = "; ".join(f"{t['what']} ({_came(t)})" for t in score.get("tried", ()))
            lines.append(f"- `{name}`, not mended: {tried or 'nothing is suggested'}; healthy: "
                         f"up to {score['healthy']:.3g}")  # fmt: skip
    lines += [
        f"- healthy {name}: {alarm}" for name, run in healthy.items() for alarm in run["alarms"]
    ]
    return ["Misses:", "\n".join(lines)] if lines else []


def _came(tried: dict[str, Any]) -> str:
    return f"loss {tried['loss']:.3g}" if "loss" in tried else tried["why"]


def _not_scored(every: Mapping[str, Cell | str], scores: Scores) -> list[str]:
    lines = [f"- `{name}`: {why}" for name, why in every.items() if isinstance(why, str)]
    for name, score in scores.items():
        if score["state"] == "harmless":
            lines.append(
                f"- `{name}`, harmless: loss {score['loss']:.3g}, and healthy ones up to "
                f"{score['healthy']:.3g}"
            )
    return ["Not scored:", "\n".join(lines)] if lines else []
