"""The wheel is whole: installed alone, it works in an empty folder."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def call(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """stdout of a command that must succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    call(*build, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_its_recipes_and_fragments_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("recipes", "configs"):
        packed = {name.removeprefix("mpcli/") for name in names if f"mpcli/{folder}/" in name}
        assert packed == {
            path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*")
        }
    assert "mpcli/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"mpcli", "mptrain-0.1.0.dist-info"}


def test_its_metadata_has_lower_bounds_only_and_the_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("mptrain-0.1.0.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    requirements = metadata.get_all("Requires-Dist", [])
    core = {r.partition(">=")[0] for r in requirements if "extra ==" not in r}
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "tensorboard",
        "report",
        "sweep",
        "mlflow",
        "wandb",
        "trackio",
        "bitsandbytes",
        "torchao",
        "deepspeed",
        "dev",
    }
    assert core >= {"torch", "torchvision", "typer", "pyyaml", "pydantic", "rich", "scikit-learn"}
    (exact,) = [r for r in requirements if r.startswith("deepspeed")]
    assert exact.startswith("deepspeed==")  # the engine uses what that version has inside
    requirements.remove(exact)
    for requirement in requirements:
        bound = requirement.partition(";")[0]
        assert ">=" in bound, requirement
        assert not set(bound.replace(">=", "")) & set("<>=!~,"), requirement


def test_installed_alone_it_works_in_an_empty_folder(wheel, tmp_path):
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python, bin_folder = environment / "bin" / "python", environment / "bin"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    call(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                     cwd=empty).strip())  # fmt: skip
    # The dependencies are this environment's; its own .pth files (the checkout) do not count.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = call(python, "-c", "import mpcli; print(mpcli.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(environment)
    script = (
        "mptrain init cifar10-fp16 && mptrain check cifar10-fp16.yaml && "
        "mptrain init digits-fp16 && mptrain run digits-fp16.yaml"
    )
    printed = call("bash", "-c", script, cwd=empty, path=bin_folder)
    assert "cifar10-fp16.yaml: ok" in printed
    assert "done" in printed
    assert (empty / "runs/digits-fp16/latest/final/model.safetensors").is_file()
