"""One thread and no network for every test, and nothing of the person's own settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from mpcli.rundir import RunDirectory
    from tests.victims import Victims

# The same examples on every run: a red build is a change, not a new random number.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
DATA = Path(os.environ.get("MPTRAIN_DATA", Path(__file__).parents[2] / "shared" / "data"))
os.environ.pop("MPTRAIN_DATA", None)


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MPTRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def shared_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the real data sets; the test is skipped where there is none."""
    if not DATA.is_dir():
        pytest.skip(f"needs the real data sets: MPTRAIN_DATA or {DATA}")
    monkeypatch.setenv("MPTRAIN_DATA", str(DATA))
    return DATA


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    """A server of runs that may be killed."""
    from tests.victims import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def whole(victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The victims' run that nothing happens to."""
    from tests.victims import recipe

    return victims.finish(tmp_path_factory.mktemp("whole") / "run", *recipe())


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Steps whose images are multiplied by a number."""
    from mpcli.data.batch import Batch
    from mpcli.data.image_dataset import ImageDataset

    factors: dict[int, float] = {}
    original = ImageDataset.train_batch

    def train_batch(self: ImageDataset, seed: int, step: int, batch_size: int) -> Batch:
        batch = original(self, seed, step, batch_size)
        factor = factors.get(step + 1, 1.0)
        return Batch({**batch.tensors, "inputs": batch["inputs"] * factor})

    monkeypatch.setattr(ImageDataset, "train_batch", train_batch)
    return factors
