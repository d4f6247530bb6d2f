"""Nothing that a run says becomes markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpcli.records import ForeignModule, ForeignRun, ModulePrecision, Plan, PlanWarning, strict_json
from mpcli.report.page import report_page
from mpcli.report.sources import read_sources
from tests.report.hostile import STRINGS
from tests.report.synthetic import finding, made_up_run, result, step_row

TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "noscript",
    "script", "h1", "h2", "h3", "h4", "p", "div", "table", "caption", "thead", "tbody", "tr", "th",
    "td", "details", "summary", "pre", "code", "b", "i", "small", "span", "ul", "li", "article",
    "form", "fieldset", "legend", "label", "input", "select", "option", "button", "output",
    "figure", "figcaption",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "id", "class", "type", "tabindex", "role",
    "scope", "aria-label", "aria-live", "aria-hidden", "for", "min", "max", "step", "value",
    "title", "checked", "data-run", "data-series", "data-log", "data-wide", "data-zoom",
    "data-root", "data-chart",
}  # fmt: skip


class Seen(HTMLParser):
    """Tags, attributes, texts of a page; what its scripts hold apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.policy = ""
        self.texts: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []
        self._in: tuple[str, str | None] = ("", None)
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.add(tag)
        self.attributes |= set(found)
        if found.get("http-equiv"):
            self.policy = found["content"] or ""
        if tag == "script":
            self.scripts.append((found.get("type"), ""))
        self._in = tag, found.get("type")

    def handle_endtag(self, tag: str) -> None:
        self._in = "", None

    def handle_data(self, text: str) -> None:
        if self._in[0] == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = kind, before + text
        else:
            self.texts.append(text)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def hostile_sources(folder: Path) -> list[Path]:
    """Two runs, a sweep and a diagnosis with the strings in every field that is text."""
    texts = iter(STRINGS * 10)
    ours = made_up_run(folder / "<img src=x onerror=alert(1)>", prefix=STRINGS[0])
    _rename(ours, texts)
    everything = "\n".join(f"# {text}" for text in STRINGS if text.isprintable())
    source = (ours / "recipe.yaml").read_text()
    lines = [f"field{n}: {json.dumps(t)}" for n, t in enumerate(STRINGS)]
    (ours / "recipe.yaml").write_text(source + "\n".join(lines) + "\n")
    (ours / "recipe.source.yaml").write_text(f"{everything}\n{source}")
    (ours / "attempts/1/environment.json").write_text(
        json.dumps(dict(zip(STRINGS, STRINGS[::-1], strict=True)))
    )
    second = ours / "attempts/2"
    second.mkdir()
    (second / "resumed.json").write_text(json.dumps({"changes": STRINGS}))
    modules = tuple(
        ModulePrecision(
            name=t, type=t, parameters=1, stored=t, computed=t, gradient=t, master=t, why=t
        )
        for t in STRINGS
    )
    warning = PlanWarning(finding=None, path=STRINGS[0], message=STRINGS[1], hint=STRINGS[2])
    plan = Plan(
        device=STRINGS[0],
        world_size=1,
        num_train=1,
        num_eval=1,
        data_source=STRINGS[1],
        sample={},
        steps=40,
        steps_per_epoch=1,
        micro_batch_size=1,
        accumulation=1,
        parameters=1,
        modules=modules,
        warnings=(warning,),
    )
    (second / "plan.json").write_text(plan.to_json())
    seen = {t: dict.fromkeys(("stored", "computed", "gradient"), t[::-1]) for t in STRINGS}
    (second / "observed.json").write_text(json.dumps(seen))
    with (ours / "steps.jsonl").open("a") as file:
        file.write(step_row(41, attempt=2) + "\n" + STRINGS[0] + "\n")
    evaluation = {"step": 20, "attempt": 1, "loss": 1.0, "ema": False, "seconds": 1.0}
    with (ours / "evals.jsonl").open("a") as file:
        file.write(json.dumps(evaluation | dict.fromkeys(STRINGS[::5], 0.5)) + "\n")
    rollback = {"step": 9, "attempt": 1, "checkpoint": 4}
    (ours / "rollbacks.jsonl").write_text(
        "".join(
            json.dumps(rollback | {"step": n + 1, "reason": t}) + "\n"
            for n, t in enumerate(STRINGS)
        )
    )
    problems = [
        {
            "file": t,
            "line": 1,
            "column": 1,
            "path": t,
            "message": t,
            "hint": t,
            "severity": "error",
            "finding": None,
        }
        for t in STRINGS
    ]
    ended = result(
        40,
        status="failed",
        exit_code=1,
        reason=STRINGS[0],
        problems=problems,
        metrics={"eval": dict.fromkeys(STRINGS, 0.5)},
    )
    (ours / "result.json").write_text(strict_json(ended))
    diagnosis = {
        "verdict": "".join(STRINGS),
        "evidence": {"path": STRINGS[3]},
        "findings": [_hostile_finding(text) for text in STRINGS],
    }
    (ours / "diagnosis.json").write_text(json.dumps(diagnosis))

    foreign = made_up_run(folder / "$$foreign$$", prefix=STRINGS[46])
    for name in ("recipe.yaml", "recipe.source.yaml", "result.json"):
        (foreign / name).unlink()
    told = ForeignModule(name=STRINGS[0], type=STRINGS[1], parameters=1, stored=STRINGS[2])
    about = ForeignRun(
        loop=STRINGS[0],
        model=STRINGS[1],
        parameters=1,
        optimizer=STRINGS[2],
        scaler=STRINGS[3],
        every=1,
        settings=dict(zip(STRINGS, STRINGS, strict=True)),
        modules=(told,),
    )
    (foreign / "foreign.json").write_text(about.to_json())
    sweep = folder / "sweep"
    trial = made_up_run(sweep / "trials" / "<b>trial")
    rows = [
        {"label": t, "scale": 2.0, "status": t, t: t, "measured": {"underflow": 0.5}}
        for t in STRINGS
    ]
    (sweep / "result.json").write_text(
        json.dumps(
            {
                "kind": STRINGS[0],
                "recommended": dict.fromkeys(STRINGS, STRINGS[5]),
                "rows": rows,
                "trials": [{"run": trial.name, "label": STRINGS[1], "seed": STRINGS[2]}],
            }
        )
    )
    return [ours, foreign, sweep]


def _rename(run: Path, texts: Iterator[str]) -> None:
    """Give every tensor of the run another name."""
    rows = [json.loads(line) for line in (run / "layers.jsonl").read_text().splitlines()]
    named = {row["name"]: text for row, text in zip(rows, texts, strict=False)}
    for row in rows:
        row["module"] = row["name"] = named[row["name"]]
    (run / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _hostile_finding(text: str) -> dict[str, Any]:
    suggestion = {"what": text, "set": [text], "code": text, "arguments": {text: text}}
    arm = {
        "steps": 1,
        "skipped": 0,
        "loss": 1.0,
        "symptom": 1.0,
        "seconds_per_step": 1.0,
        "peak_memory_bytes": 1,
    }
    tried = {
        "suggestion": suggestion,
        "fixed": True,
        "why": text,
        "symptom": text,
        "checkpoint": None,
        "without": arm,
        "with_it": arm,
    }
    return finding(
        cause=text,
        layers=[text],
        evidence={text: text},
        suggestion=suggestion,
        tried=[tried],
        not_tried=text,
        consequences=[finding(cause=text)],
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of hostile sources, each of the strings a run's, a sweep's, a diagnosis's name."""
    folder = tmp_path_factory.mktemp("hostile")
    found = read_sources(hostile_sources(folder))
    (bare,) = read_sources([made_up_run(folder / "bare", steps=1)]).runs
    bare = replace(bare, steps=bare.steps.at(np.zeros(0, np.intp)), evaluations=())
    (sweep,), (diagnosis,) = found.sweeps, found.diagnoses
    for text in STRINGS:
        found.runs.append(replace(bare, label=text))
        found.sweeps.append(replace(sweep, label=text, kind=text, recommended={}, rows=()))
        found.diagnoses.append(replace(diagnosis, label=text, of=text[::-1], findings=()))
    return report_page(found)


def test_no_string_becomes_markup(page: str) -> None:
    seen = Seen(page)
    assert seen.tags <= TAGS
    assert seen.attributes <= ATTRIBUTES
    text = "".join(seen.texts)
    assert [string for string in STRINGS if string not in text] == []


def test_no_string_becomes_script(page: str) -> None:
    seen = Seen(page)
    (kind, data), *scripts = seen.scripts
    assert kind == "application/json" and json.loads(data)["document"]
    assert [kind for kind, _ in scripts] == [None, None]
    allowed = re.findall(r"'sha256-([^']*)'", seen.policy)
    hashes = [hashlib.sha256(script.encode()).digest() for _, script in scripts]
    assert [base64.b64decode(text) for text in allowed] == hashes
    assert "pwned" not in "".join(script for _, script in scripts)


def test_the_policy_allows_nothing_else(page: str) -> None:
    policy = re.sub(r"'sha256-[^']*'", "HASH", Seen(page).policy)
    assert policy == (
        "default-src 'none'; script-src HASH HASH; style-src-elem 'unsafe-inline'; "
        "style-src-attr 'none'; base-uri 'none'; form-action 'none'"
    )


@pytest.mark.slow
def test_nothing_runs_in_a_browser(page: str, opened: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page)
    shown = opened(file)
    for plot in shown.page.locator(".plot").all():  # tooltips and the cursor's values too
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        shown.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for kind in shown.page.eval_on_selector_all(
        "#layers-tensor option", "(o) => o.map(x => x.value)"
    ):
        shown.page.select_option("#layers-tensor", kind)
    shown.page.eval_on_selector_all("summary", "(found) => found.forEach((s) => s.click())")
    shown.page.wait_for_timeout(300)
    assert shown.page.evaluate("() => window.pwned") is None
    assert shown.requests == [file.as_uri()]
    assert not shown.complaints
    assert not shown.dialogs
