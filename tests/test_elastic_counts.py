"""How many workers an elastic group begins with, of what Ray says there is room for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from avray.train import elastic

ROOM = {"head": {"CPU": 4.0}, "spot": {"CPU": 4.0}}


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> elastic.EvenCounts:
    """Two nodes with room for two workers each, of which one may go; decisions are the counts themselves."""
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_non_running_worker_group",
                        lambda self: self._count_possible_workers(ROOM))
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group",
                        lambda self, state, status: self._count_possible_workers(ROOM))
    monkeypatch.setattr(elastic, "staying_nodes", lambda: {"head", "spot"})
    return elastic.EvenCounts(ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2}), [1, 2, 4])


def decided(policy: elastic.EvenCounts, running: int) -> int:
    if running:
        return policy.make_decision_for_running_worker_group(SimpleNamespace(num_workers=running), None)
    return policy.make_decision_for_non_running_worker_group()


def test_a_count_that_shares_the_rows_evenly(policy: elastic.EvenCounts) -> None:
    assert decided(policy, 0) == decided(policy, 2) == 4
    policy.counts = [1, 3]
    assert decided(policy, 0) == 3


def test_a_node_that_goes_is_not_begun_on(policy: elastic.EvenCounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "staying_nodes", lambda: {"head"})
    assert decided(policy, 4) == 4, "the group works on until the node is gone"
    assert decided(policy, 0) == decided(policy, 2) == 2
