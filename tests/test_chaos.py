"""Workers, nodes and drivers killed at random moments; ``tests/chaos.py`` says how, and does it for more seeds."""

from __future__ import annotations

import pytest

from tests.chaos import opened


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments() -> None:
    """The faults of three seeds in one round, since what takes long is to start."""
    with opened() as site:
        record = site.round(0, 1, 2)
    assert not record.wrong, record
