"""A disk that is full before or during a run: exit 7, and nothing left to stand in the way."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mpcli.plan import make_plan
from mpcli.recipe.errors import Exit, UserError
from mpcli.rundir import RunDirectory
from tests.small import CPU, run_small, small_recipe


def create(folder: Path, output: Path | None, **environment: str) -> RunDirectory:
    loaded = small_recipe(folder)
    return RunDirectory.create(loaded, make_plan(loaded.recipe, CPU), environment, output)


@pytest.mark.parametrize("name", ["recipe.source.yaml", "environment.json", "latest"])
def test_a_run_that_cannot_begin_leaves_nothing_behind(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write = Path.write_text

    def full(path: Path, *arguments: object, **options: object) -> int:
        if path.name == name:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    if name == "latest":
        Path("runs/small/latest").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"cannot write to the run directory runs/small/20"
    ) as caught:
        create(tmp_path, None)
    assert caught.value.exit_code == Exit.STORAGE
    left = [path.name for path in Path("runs/small").iterdir()]
    assert left == (["latest"] if name == "latest" else [])


def test_after_a_full_disk_the_same_output_can_be_used(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_write_record", lambda *_: Path("/dev/full").write_text("x"))
        with pytest.raises(UserError, match="No space left on device"):
            create(tmp_path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    create(tmp_path, tmp_path / "out").close()


def test_another_process_that_just_took_the_folder_keeps_its_files(tmp_path, monkeypatch):
    run = create(tmp_path, tmp_path / "out")
    monkeypatch.setattr("mpcli.rundir._empty_folder", lambda output: output)
    with pytest.raises(UserError):
        create(tmp_path, tmp_path / "out")
    assert run.recipe_path.exists()
    run.close()


def test_an_output_that_is_a_dangling_link_is_named_as_such(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="a link to nowhere, which does not exist") as caught:
        create(tmp_path, tmp_path / "link")
    assert caught.value.exit_code == Exit.USAGE


class Unclosable:
    """A file whose last bytes cannot be written."""

    def close(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("told", [False, True])
def test_a_failing_close_is_told_unless_a_write_was_before_it(tmp_path, told):
    run = create(tmp_path, tmp_path / "out")
    run._files["x"] = Unclosable()  # type: ignore[assignment]
    run._failed = told
    if told:
        run.close()
    else:
        with pytest.raises(UserError) as caught:
            run.close()
        assert caught.value.exit_code == Exit.STORAGE
    create(tmp_path, tmp_path / "other").close()


def test_nothing_in_a_run_directory_names_its_path(tmp_path):
    run, _ = run_small(tmp_path, name="some-peculiar-name")
    texts = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    assert texts
    assert not any(b"some-peculiar-name" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "begun"), [(1_500, False), (12_000, True)])
def test_a_process_that_may_write_no_more_exits_7(tmp_path, limit, begun):
    small_recipe(tmp_path)
    done = subprocess.run(
        [Path(sys.executable).with_name("mptrain"), "run", "small.yaml", "--output", "out-dir",
         "--set", "train.steps=2000", "--json"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},  # a cut-off .pyc would break others
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 7
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    output = tmp_path / "out-dir"
    assert (output / "recipe.yaml").exists() == begun
    if begun:
        result = json.loads((output / "result.json").read_text())
        assert result["problems"][0]["message"] == (
            "cannot write to the run directory: File too large"
        )
        assert "out-dir" not in (output / "attempts/1/log.rank0.txt").read_text()
