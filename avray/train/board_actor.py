"""The actor between rank 0 and the driver. Apart from ``board``, whose imports would cost its process two seconds."""

from __future__ import annotations

from typing import Any

import ray


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
    list was taken was lost."""
    return ray.remote(num_cpus=0)(Board).remote()
