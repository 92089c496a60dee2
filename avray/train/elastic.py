"""Workers that come and go with the nodes of a cluster: ``trainer.num_workers=[2,8]``.

Ray Train begins with as many as there is room for, begins again with fewer where a node is lost, and looks now and then
whether there is room for more. It would take any number; the order of rows takes those that share its lanes evenly, so
what there is room for is rounded down. Two of Ray's own classes are extended for it, which it does not promise to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class EvenCounts(ElasticScalingPolicy):
    """``counts``: the numbers of workers that may be."""

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.counts = counts

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self.counts if count <= room), default=0)


class ElasticTrainer(TorchTrainer):
    def __init__(self, *args: Any, counts: Sequence[int], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.counts = counts

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        return super()._initialize_and_run_controller(
            **given | {"scaling_policy": EvenCounts(self.scaling_config, self.counts)})
