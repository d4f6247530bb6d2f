from __future__ import annotations

import json

import pytest
from rich.cells import cell_len

from mpcli.recipe.errors import Place, Problem
from mpcli.recipe.render import problem_json, render_problem


def test_place_path_message_and_hint() -> None:
    place = Place("r.yaml", 7, 5, 4, "    lrrr: 1")
    assert render_problem(Problem("unknown field", "did you mean `lr`?", "optim.lrrr", place)) == (
        "r.yaml:7:5: optim.lrrr: unknown field\n"
        "    7 |     lrrr: 1\n"
        "      |     ^^^^\n"
        "  help: did you mean `lr`?"
    )


def test_without_place() -> None:
    assert render_problem(Problem("no such device")) == "error: no such device"
    assert render_problem(Problem("unsafe", severity="warning")) == "warning: unsafe"


def test_a_whole_file() -> None:
    assert render_problem(Problem("no such file", place=Place("r.yaml", 0, 0))) == (
        "r.yaml: no such file"
    )


def test_a_warning_says_so() -> None:
    place = Place("r.yaml", 1, 1)
    shown = render_problem(Problem("unsafe", None, "optim.eps", place, severity="warning"))
    assert shown == "r.yaml:1:1: warning: optim.eps: unsafe"


@pytest.mark.parametrize(
    ("before", "marked"),
    [("a: ", "b"), ("学習: ", "値"), ("\x1b[2J: ", "v"), ("é: ", "ü"), ("\udcff: ", "😀")],
)
def test_carets_stand_under_what_is_meant(before: str, marked: str) -> None:
    place = Place("r.yaml", 1, len(before) + 1, len(marked), f"{before}{marked} # rest")
    _, source, carets = render_problem(Problem("wrong", place=place)).splitlines()
    at = source.index(marked)
    assert carets.index("^") == cell_len(source[:at])
    assert carets.count("^") == cell_len(marked)


@pytest.mark.parametrize("column", [1, 60, 5_000, 999_990])
def test_long_lines_are_cut_around_the_caret(column: int) -> None:
    text = "x" * (column - 1) + "HERE" + "y" * 1_000_000
    shown = render_problem(Problem("wrong", place=Place("r.yaml", 1, column, 4, text)))
    _, source, carets = shown.splitlines()
    assert len(source) < 120
    assert carets.index("^") == source.index("HERE")


def test_json_has_every_part() -> None:
    place = Place("r.yaml", 7, 5, 4, "    lrrr: 1")
    assert json.loads(json.dumps(problem_json(Problem("w", "h", "optim.lrrr", place)))) == {
        "file": "r.yaml",
        "line": 7,
        "column": 5,
        "path": "optim.lrrr",
        "message": "w",
        "hint": "h",
        "severity": "error",
        "finding": None,
    }
    nowhere = problem_json(Problem("w"))
    assert [nowhere[key] for key in ("file", "line", "column", "path")] == [None] * 4
