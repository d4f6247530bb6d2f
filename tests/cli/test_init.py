"""`mptrain init`: templates are listed, copied, and never written over anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import packaged_dir

RECIPES = sorted(path.stem for path in packaged_dir("recipes").glob("*.yaml"))
MODES = {  # of those that are not named after it
    "bert-base-mlm": "bf16",
    "bert-large-mlm": "fp16-master",
    "bert-tiny-mlm": "fp32",
    "cifar10-resnet18": "bf16",
    "cifar10-vit": "bf16",
    "gpt-small": "fp16",
    "sst2": "fp32",
}
FOR_GPUS = ("bert-large-mlm",)
FRAGMENTS = sorted(packaged_dir("configs").glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_named_templates_exist():
    assert set(RECIPES) >= {
        f"{data}-{mode}" for data in ("digits", "cifar10") for mode in ("fp32", "fp16", "bf16")
    } | {"cifar10-fp16-master"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_template_is_valid_named_after_its_file_and_commented(mptrain, name):
    assert mptrain("init", name).code == 0
    assert mptrain("check", f"{name}.yaml").code == 0
    text = Path(f"{name}.yaml").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert lines[1] == "# yaml-language-server: $schema=mptrain.schema.json"
    recipe = load_recipe(f"{name}.yaml").recipe
    assert recipe.name == name
    named = name.partition("-")[2].removesuffix("-scheduled")
    assert recipe.precision.mode == MODES.get(name, named)
    if recipe.precision.mode.startswith("fp16") and name not in FOR_GPUS:
        assert recipe.eval.every is None


def test_templates_of_one_data_set_differ_in_precision_and_evaluation_only():
    for data in ("digits", "cifar10"):
        files = [
            file
            for file in packaged_dir("recipes").glob(f"{data}-*.yaml")
            if file.stem not in MODES
        ]
        recipes = [load_recipe(file).recipe for file in files]
        rest = [r.model_dump(exclude={"name", "precision", "eval"}) for r in recipes]
        assert len(rest) > 3
        assert all(values == rest[0] for values in rest)


@pytest.mark.parametrize("file", FRAGMENTS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_fragment_is_commented_and_can_be_used(mptrain, recipe, file):
    assert file.read_text().startswith("# ")
    section = file.parent.name
    values = yaml.safe_load(recipe.read_text())
    values.pop(section, None)
    recipe.write_text(yaml.safe_dump({"use": {section: file.stem}} | values))
    outcome = mptrain("check", recipe)
    assert outcome.code == 0, outcome.err


def test_the_list_has_a_line_of_description_for_each(mptrain):
    lines = mptrain("init").out.splitlines()
    described = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:] if line}
    assert sorted(described) == sorted([*RECIPES, "plugin"])
    assert described["digits-fp16"].startswith("Handwritten digits")
    assert mptrain("init", "--json").json["templates"] == described


def test_a_copy_stands_beside_the_schema_that_it_names(mptrain):
    outcome = mptrain("init", "digits-fp16")
    assert outcome.out == "wrote digits-fp16.yaml\n"
    assert "mptrain check digits-fp16.yaml" in outcome.err
    assert json.loads(Path("mptrain.schema.json").read_text()) == mptrain("schema").json


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("mine.yaml", "mine.yaml"),
        ("folder", "folder/digits-bf16.yaml"),
        ("new/mine.yml", "new/mine.yml"),
        (".", "digits-bf16.yaml"),
    ],
)
def test_the_path_may_be_a_file_or_a_folder(mptrain, path, written):
    Path("folder").mkdir()
    outcome = mptrain("init", "digits-bf16", path, "--json")
    schema = Path(written).parent / "mptrain.schema.json"
    assert outcome.json == {
        "status": "done", "exit_code": 0, "problems": [], "written": [written, str(schema)],
    }  # fmt: skip
    assert Path(written).is_file()
    assert schema.is_file()


def test_nothing_is_written_over(mptrain):
    Path("digits-fp32.yaml").write_text("mine")
    outcome = mptrain("init", "digits-fp32")
    assert outcome.code == 2
    assert outcome.err.startswith("error: digits-fp32.yaml exists already\n")
    assert Path("digits-fp32.yaml").read_text() == "mine"
    assert list(Path().iterdir()) == [Path("digits-fp32.yaml")]


def test_an_unknown_template_is_answered_with_the_closest(mptrain):
    outcome = mptrain("init", "digit-fp16")
    assert outcome.code == 2
    assert outcome.err == "error: no template `digit-fp16`\n  help: did you mean `digits-fp16`?\n"


@pytest.mark.parametrize("path", ["foo.txt", "new/folder", "/dev/null", "file"])
def test_a_path_that_is_neither_a_folder_nor_a_recipe_is_refused(mptrain, path):
    Path("file").write_text("")
    outcome = mptrain("init", "digits-fp16", path)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {path}: is no folder, and the name of a recipe ends in")
    assert list(Path().iterdir()) == [Path("file")]


def test_what_to_type_next_is_quoted(mptrain):
    assert "mptrain run 'my file.yaml'" in mptrain("init", "digits-fp16", "my file.yaml").err


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/x.yaml", "file is a file"),
        ("file/new/x.yaml", "Not a directory"),
        (f"{'x' * 300}.yaml", "File name too long"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_exits_7(mptrain, path, reason):
    Path("file").write_text("")
    outcome = mptrain("init", "digits-fp16", path, "--json")
    assert outcome.code == outcome.json["exit_code"] == 7
    assert outcome.json["problems"][0]["message"] == f"cannot write {path}: {reason}"


@pytest.mark.parametrize("limit", [1, 4])  # KiB: less than the recipe, less than the schema
def test_a_full_disk_leaves_no_half_of_a_file(mptrain_process, tmp_path, limit):
    script = f"ulimit -f {limit}; mptrain init digits-fp16"
    for _ in range(2):
        outcome = mptrain_process(script, PYTHONDONTWRITEBYTECODE="1")  # or cut-off ones
        assert outcome.code == 7
        assert outcome.err.startswith("error: cannot write digits-fp16.yaml: File too large\n")
    assert list(tmp_path.iterdir()) == []
