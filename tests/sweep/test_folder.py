"""A folder belongs to one sweep, and the same command finds it again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpcli.recipe.errors import Exit, UserError
from mpcli.rundir import RunDirectory
from mpcli.sweep.folder import SweepFolder, identity
from mpcli.sweep.results import SweepResult
from tests.small import RECIPE, small_recipe

ASKED = {"over": [["optim.lr=0.1", "optim.lr=0.2"]], "steps": None}


def refused(folder: Path, code: Exit, *overrides: str, asked: dict[str, object] = ASKED) -> str:
    with pytest.raises(UserError) as told:
        SweepFolder(folder).prepare(small_recipe(folder.parent, *overrides), "grid", asked)
    assert told.value.exit_code is code
    return str(told.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a sweep that has begun."""
    SweepFolder(tmp_path / "sweep").prepare(small_recipe(tmp_path), "grid", ASKED)
    return tmp_path / "sweep"


def test_the_same_sweep_is_gone_on_with(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    loaded = small_recipe(folder.parent, "output.keep_last=7")
    about = SweepFolder(folder).prepare(loaded, "grid", {**ASKED, "steps": None})
    assert about.name.startswith("small/sweep-grid-")
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before


def test_another_sweep_is_refused_with_what_differs(folder: Path) -> None:
    text = refused(folder, Exit.USAGE, asked={**ASKED, "steps": 7})
    assert "a sweep with steps `null`, found `7`" in text
    text = refused(folder, Exit.USAGE, "optim.lr=0.5", "train.steps=5")
    assert "optim.lr: the sweep has `0.1`, found `0.5`" in text
    assert "train.steps: the sweep has `4`, found `5`" in text


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "not empty, and holds no sweep" in refused(tmp_path / "other", Exit.USAGE)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    assert "holds a run" in refused(tmp_path / "run", Exit.USAGE)
    (tmp_path / "file").touch()
    assert "is a file" in refused(tmp_path / "file", Exit.USAGE)


@pytest.mark.parametrize("text", ["", "junk", "[]", '{"kind": "grid"}', '{"kind": "gri'])
def test_a_damaged_study_record_is_named(folder: Path, text: str) -> None:
    (folder / "study.json").write_text(text)
    assert "study.json: says nothing about a sweep" in refused(folder, Exit.CHECKPOINT)


def test_a_sweep_whose_question_is_lost_is_gone_on_with(folder: Path) -> None:
    (folder / "study.journal").write_text("")
    (folder / "study.json").unlink()
    refused(folder, Exit.USAGE, "optim.lr=0.3")  # of another recipe it is not
    SweepFolder(folder).prepare(small_recipe(folder.parent), "grid", ASKED)


def test_processes_that_end_together_write_the_result_one_after_the_other(folder: Path) -> None:
    result = SweepResult(
        kind="grid", name="small", study="sweep", steps=1, seeds=(0,), rows=({},) * 500, trials=()
    )
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(SweepFolder(folder).write_result, result) for _ in range(40)]:
            done.result()
    assert SweepResult.model_validate_json((folder / "result.json").read_bytes()) == result


def test_a_torn_recipe_of_a_sweep_is_named(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("name: [")
    assert "the sweep's own recipe" in refused(folder, Exit.CHECKPOINT)


def test_a_sweep_is_no_run(folder: Path) -> None:
    with pytest.raises(UserError, match="a sweep, and not a run") as told:
        RunDirectory.open(folder)
    assert told.value.exit_code is Exit.USAGE


def test_a_beginning_that_was_cut_short_is_finished(folder: Path) -> None:
    """By the death of its process after each file that it writes."""
    for left in (["claim.lock"], ["claim.lock", "study.json.tmp"], ["claim.lock", "study.json"]):
        for path in folder.iterdir():
            if path.name not in left:
                path.rmdir() if path.is_dir() else path.unlink()
        SweepFolder(folder).prepare(small_recipe(folder.parent), "grid", ASKED)
        assert (folder / "recipe.yaml").read_text().startswith("name: small\n")
        assert json.loads((folder / "study.json").read_text())["asked"] == ASKED
        (folder / "study.json.tmp").touch()


def test_the_name_of_a_study_does_not_depend_on_the_machine(tmp_path: Path) -> None:
    data = RECIPE.replace("{kind: digits}", "{kind: cifar10, path: %s}")
    names = []
    for place in ("/here", "/there"):
        loaded = small_recipe(tmp_path, f"output.keep_last={len(place)}", text=data % place)
        names.append(identity(loaded, ASKED))
    assert names[0] == names[1]
    assert names[0] != identity(loaded, {**ASKED, "steps": 1})
