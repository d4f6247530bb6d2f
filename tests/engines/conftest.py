"""Two processes for every test of an engine: to start them takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Group, ranks_of


@pytest.fixture(scope="session")
def pair() -> Iterator[Group]:
    """Two ranks that wait for work."""
    with ranks_of(2) as group:
        yield group
