"""The actor between rank 0 and the driver. Apart from ``board``, whose imports would cost its process two seconds."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Board:
    """Between rank 0 and the driver: a list of messages, emptied by whoever reads it."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []

    def tell(self, kind: str, content: Any) -> None:
        self.messages.append((kind, content))

    def take(self) -> list[tuple[str, Any]]:
        taken, self.messages = self.messages, []
        return taken


def open_board() -> Any:
    """An actor that takes one call at a time: with several, messages overtook each other, and one that came while the
    list was taken was lost. It lives on the driver's node, since others may be taken away; where its process is killed
    another takes its place, and what nobody had read is lost: progress, not checkpoints."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Board).remote()
