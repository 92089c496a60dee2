"""Workers that come and go with the nodes of a cluster: ``trainer.num_workers=[2,8]``.

Ray Train begins with as many as there is room for, begins again with fewer where a node is lost, and looks now and then
whether there is room for more. It would take any number; the order of rows takes those that share its lanes evenly, so
what there is room for is rounded down. And it would count nodes that are announced to go, or that have just died, and
wait a minute for workers which cannot start there: those are left out. Two of Ray's own classes are extended for it,
which it does not promise to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class EvenCounts(ElasticScalingPolicy):
    """``counts``: the numbers of workers that may be."""

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.counts = counts
        self.running = 0

    def make_decision_for_non_running_worker_group(self) -> Any:
        self.running = 0
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self.running = worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """A group at work is not made smaller for a node that is going to go: it works on until then."""
        known = staying_nodes()
        staying = {node: resources for node, resources in reserved_resources.items() if node in known}
        return max(self._even(staying), min(self.running, self._even(reserved_resources)))

    def _even(self, resources: Any) -> int:
        room = super()._count_possible_workers(resources)
        return max((count for count in self.counts if count <= room), default=0)


def staying_nodes() -> set[str]:
    """The nodes that are there and not announced to go, by their ids."""
    leaving = ray._private.state.state.get_draining_nodes() or {}
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving}


class ElasticTrainer(TorchTrainer):
    def __init__(self, *args: Any, counts: Sequence[int], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.counts = counts

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        return super()._initialize_and_run_controller(
            **given | {"scaling_policy": EvenCounts(self.scaling_config, self.counts)})
