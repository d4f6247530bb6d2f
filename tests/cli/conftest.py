"""Ways to call the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mpcli import states
from mpcli.cli.app import main
from tests.synthetic_runs import NOW


@dataclass
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON object that it must be."""
        return json.loads(self.out)


@pytest.fixture
def mptrain(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()  # what the test itself printed, or a library that it uses
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def mptrain_process(tmp_path: Path) -> Callable[..., Outcome]:
    """Run a command line of `sh` in a process of its own, in `tmp_path`; `mptrain` is on PATH."""

    def call(script: str, **variables: str) -> Outcome:
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", script],
            capture_output=True, cwd=tmp_path, env=environment | variables, timeout=300,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


RECIPE = """\
name: tiny
task: {kind: image-classification, model: {kind: smallnet, width: 4}}
data: {kind: digits}
precision: {mode: fp16}
optim: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {steps: 6, global_batch_size: 16}
eval: {every: null}
engine: {kind: local, device: cpu}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of six small fp16 steps."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def there(twenty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the folder of a module's `twenty` runs, at a certain time."""
    monkeypatch.chdir(twenty)
    monkeypatch.setattr(states.time, "time", lambda: NOW)
    return twenty
