"""What the README shows is so: commands run, recipes load, messages and tables are exact."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpcli.cli.app import app
from mpcli.recipe.errors import Exit
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import packaged_dir
from tests.tiny_cifar import write_tiny_cifar

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> Iterator[str]:
    """Every line of the shell blocks, without its comment."""
    for line in "".join(blocks("sh")).splitlines():
        if command := re.sub(r"\s+#.*", "", line).strip():
            yield command


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_recipes_load(tmp_path):
    recipes = [text for text in blocks("yaml") if re.search("^name:", text, re.MULTILINE)]
    assert recipes
    for text in recipes:
        (tmp_path / "recipe.yaml").write_text(text)
        load_recipe(tmp_path / "recipe.yaml")


def test_the_error_shown_is_the_one_printed(tmp_path, monkeypatch, mptrain):
    (shown,) = blocks("text")
    monkeypatch.chdir(tmp_path)
    template = (packaged_dir("recipes") / "cifar10-fp16.yaml").read_text()
    Path("cifar10-fp16.yaml").write_text(template.replace("momentum:", "momentun:"))
    assert mptrain("check", "cifar10-fp16.yaml").err == shown


def test_the_exit_codes_are_those_of_the_program():
    table = README.partition("## Exit codes")[2].partition("\n## ")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)}
    assert listed == set(Exit)


def test_the_commands_are_those_of_the_program():
    table = README.partition("## Commands")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `mptrain (\w+)", table, flags=re.MULTILINE))
    groups = {group.name for group in app.registered_groups}
    assert listed == {command.callback.__name__ for command in app.registered_commands} | groups


def test_what_make_is_asked_to_do_exists_and_is_what_ci_runs():
    named = set(re.findall(r"make ([a-z][a-z-]+)", "\n".join([*commands(), README])))
    assert {"run", "test", "test-slow"} <= named - {"docs"} <= make_targets()
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in ci if line.startswith("make ")] == [
        "make check", "make test", "make test-slow",
    ]  # fmt: skip


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert all((ROOT / link.partition("#")[0]).exists() for link in links)


@pytest.mark.slow
def test_every_command_runs_as_shown(tmp_path):
    write_tiny_cifar(tmp_path / "data" / "cifar10", num_train=256, num_eval=64)
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    shown = [c for c in commands() if not c.startswith(("make ", "pip "))]
    assert len(shown) >= 10
    script = "\n".join(["set -ex", *shown])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    latest = tmp_path / "runs" / "cifar10-fp32" / "latest"
    assert json.loads((latest / "result.json").read_text())["steps_attempted"] == 20
    assert json.loads((tmp_path / "second" / "result.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_pip_install_as_shown(tmp_path):
    (shown,) = (command for command in commands() if command.startswith("pip "))
    offline = f"--no-deps --no-index --no-build-isolation --target {tmp_path / 'installed'}"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m {shown} {offline}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "installed" / "mpcli" / "recipes" / "digits-fp16.yaml").is_file()


@pytest.mark.slow
def test_make_run_trains_the_digits():
    if not (ROOT / ".venv" / "bin" / "mptrain").exists():
        pytest.skip("make install was not run in this checkout")
    # -o: what is installed is under test, whatever the age of the stamp.
    command = ["make", "-o", ".venv/.installed", "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^status +done$", done.stdout, flags=re.MULTILINE)
