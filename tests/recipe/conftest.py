from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

VALID = """\
name: my-run
task: {kind: image-classification, model: {kind: smallnet}}
data: {kind: digits}
precision: {mode: fp16}
optim: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {epochs: 3, global_batch_size: 64}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a file in a fresh current folder and returns its name; without text a valid recipe."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes = VALID, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write
