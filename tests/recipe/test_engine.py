"""A recipe runs on many processes by its engine section alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mpcli.recipe.engine import Ddp, Fsdp2
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import packaged_dir
from tests.recipe.conftest import VALID

RECIPES = sorted(packaged_dir("recipes").glob("*.yaml"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_takes_other_engines(file: Path, kind: str) -> None:
    engine = load_recipe(file, [f"engine.kind={kind}", "engine.processes=2"]).recipe.engine
    assert (engine.kind, engine.processes) == (kind, 2)
    assert load_recipe(file, [f"use.engine={kind}"]).recipe.engine.kind == kind


@pytest.mark.parametrize(("kind", "section"), [("ddp", Ddp), ("fsdp2", Fsdp2)])
def test_another_kind_begins_with_its_defaults_and_says_what_is_dropped(
    write: Callable[..., str], kind: str, section: type[Ddp] | type[Fsdp2]
) -> None:
    recipe = write(VALID + "engine: {kind: local, compile: true, data_workers: 2}\n")
    loaded = load_recipe(recipe, [f"engine.kind={kind}"])
    assert loaded.recipe.engine == section(kind=kind)  # type: ignore[arg-type]
    compiled, workers = loaded.dropped
    assert compiled.startswith("engine.compile (") and f"engine.kind is now {kind}" in compiled
    assert workers.startswith("engine.data_workers (")
    kept = load_recipe(recipe, ["engine.kind=ddp", "engine.compile=true"]).recipe.engine
    assert kept.compile
