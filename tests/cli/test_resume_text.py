"""Resuming what began with another run's model, by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mpcli.recipe.errors import Exit
from tests.tasks.test_text import MLM, classification

ON = ("--set", "train.steps=4")


@pytest.fixture(autouse=True)
def _begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mptrain: Any) -> None:
    """A classifier in `c` that began with `runs/mlm/latest`."""
    monkeypatch.chdir(tmp_path)
    Path("mlm.yaml").write_text(MLM)
    assert mptrain("run", "mlm.yaml").code == 0
    began = "  init_from: runs/mlm/latest"
    Path("c.yaml").write_text(classification(tmp_path, began, "tokenizer: null"))
    assert mptrain("run", "c.yaml", "--output", "c", "--set", "train.steps=2").code == 0


def test_the_newest_run_is_resolved_when_a_run_begins(mptrain: Any, tmp_path: Path) -> None:
    first = Path("runs/mlm/latest").resolve()
    assert mptrain("run", "mlm.yaml", "--set", "data.tokenizer.lowercase=false").code == 0
    assert Path("runs/mlm/latest").resolve() != first
    recipe = yaml.safe_load(Path("c/recipe.yaml").read_text())
    assert recipe["task"]["init_from"] == str(first)
    assert mptrain("run", "--resume", "c", *ON).code == 0


def test_a_run_goes_on_with_its_own_tokens_only(mptrain: Any, tmp_path: Path) -> None:
    first = Path("runs/mlm/latest").resolve()
    assert mptrain("run", "mlm.yaml", "--set", "data.tokenizer.lowercase=false").code == 0
    second = Path("runs/mlm/latest").resolve()
    first.rename("kept")
    second.rename(first)
    outcome = mptrain("run", "--resume", "c", *ON, "--json")
    assert outcome.code == Exit.USAGE
    (problem,) = outcome.json["problems"]
    assert problem["path"] == "task"
    assert "tokenizer is not what the run began with" in problem["message"]
    assert not Path("c/attempts/2").exists()
    first.rename("other")
    Path("kept").rename(first)
    assert mptrain("run", "--resume", "c", *ON).code == 0
