"""Workers, nodes and drivers killed at random moments; ``tests/chaos.py`` says how, and does it for more seeds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos import WORKS, Site, opened

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with opened() as found:
        yield found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("work", WORKS)
def test_killed_at_random_moments(site: Site, work: str, seed: int) -> None:
    record = site.run(work, seed)
    assert not record.wrong, record
