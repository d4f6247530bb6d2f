"""Every seeded mistake gives exactly the message that the documentation lists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()
SECTION = re.compile(r"^## (.+)\n\n```yaml\n(?:.*\n)*?```\n\n```text\n((?:.*\n)*?)```$", re.M)
DOCUMENTED = dict(SECTION.findall((ROOT / "docs" / "recipe-errors.md").read_text("utf-8")))
MISTAKES = {path.stem: path for path in generate.MISTAKES.glob("*.yaml")}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_message(name: str) -> None:
    assert generate.message(MISTAKES[name]) + "\n" == DOCUMENTED[name.replace("-", " ")]


def test_all_are_documented() -> None:
    assert {name.replace("-", " ") for name in MISTAKES} == set(DOCUMENTED)
    assert len(MISTAKES) >= 45


@pytest.mark.parametrize("name", generate.GENERATED)
def test_generated_files_are_current(name: str) -> None:
    assert (ROOT / name).read_text("utf-8") == generate.GENERATED[name](), "run `make docs`"
