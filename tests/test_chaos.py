"""Workers, nodes and drivers killed at random moments; ``tests/chaos.py`` says how, and does it for more seeds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos import Site, opened

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with opened() as found:
        yield found


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(site: Site, seed: int) -> None:
    record = site.round(seed)
    assert not record.wrong, record
