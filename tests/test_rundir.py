"""What a run directory promises to those who look at it from outside."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mpcli.launch import launch
from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.rundir import RunDirectory
from tests.small import CPU, Silent, run_small, small_recipe


def is_locked(run: RunDirectory) -> bool:
    """Whether a process writes there; asked as another process would."""
    with (run.path / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_run_holds_its_lock_until_it_ends(tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path)
    run = RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), {}, tmp_path / "run")
    assert is_locked(run)
    display, seen = Silent(), []
    display.evaluated = lambda row: seen.append(is_locked(run))  # type: ignore[method-assign]
    launch(run, display)
    assert seen == [True]
    assert not is_locked(run)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_result_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run, result = run_small(tmp_path, "train.steps=1")
    path = run.path / "result.json"
    path.unlink()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError) as caught:
        run.write_result(result)
    assert caught.value.exit_code == Exit.STORAGE
    assert not path.exists()
