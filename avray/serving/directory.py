"""Which models there are, how to reach them, and how many requests each has under way.

Every Serve application named ``model-…`` is one; they come, go and change while the gateway runs. A model's card is
asked for once per deployment and kept, so that one scaled to zero stays listed without being woken.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray.serve
from ray.serve.exceptions import RayServeException

from avray.serving.messages import Card
from avray.serving.metrics import Metrics
from avray.serving.refusals import ApiError
from avray.settings.serve import LimitSettings

PREFIX = "model-"
POLL_S = 1.0
CARD_TIMEOUT_S = 600.0
SETTLE_S = 30.0

logger = logging.getLogger("ray.serve")


@dataclass
class Entry:
    handle: Any
    card: Card | None = None
    version: float = 0.0
    settles: float = 0.0
    """Until then (``time.monotonic``) its card is asked for again and again: replicas are being replaced."""
    is_ready: bool = False
    under_way: int = 0
    mean_s: float = 1.0
    asking: asyncio.Task[None] | None = field(default=None, repr=False)


class Directory:
    def __init__(self, limits: LimitSettings, metrics: Metrics, handles: Mapping[str, Any] | None = None) -> None:
        self.limits, self.metrics = limits, metrics
        self.entries: dict[str, Entry] = {name: Entry(handle) for name, handle in (handles or {}).items()}
        self.is_fixed = handles is not None

    async def run(self) -> None:
        """Follow what Serve has, for ever."""
        while True:
            try:
                await self.refresh()
            except Exception:
                logger.exception("The list of models could not be refreshed")
            await asyncio.sleep(POLL_S)

    async def refresh(self) -> None:
        if self.is_fixed:
            for entry in self.entries.values():
                self._ask(entry)
                entry.is_ready = entry.card is not None
            return
        status = await asyncio.to_thread(ray.serve.status)
        found = {name.removeprefix(PREFIX): app for name, app in status.applications.items()
                 if name.startswith(PREFIX) and app.status.value != "DELETING"}
        for name in self.entries.keys() - found.keys():
            del self.entries[name]
        for name, app in found.items():
            if name not in self.entries:
                try:
                    self.entries[name] = Entry(await asyncio.to_thread(ray.serve.get_app_handle, PREFIX + name))
                except (RayServeException, ValueError):  # not there yet
                    continue
            entry = self.entries[name]
            entry.is_ready = app.status.value == "RUNNING" and entry.card is not None
            if app.status.value != "RUNNING" or entry.version != app.last_deployed_time_s:
                entry.settles, entry.version = time.monotonic() + SETTLE_S, app.last_deployed_time_s
            if app.status.value == "RUNNING":
                self._ask(entry)

    def _ask(self, entry: Entry) -> None:
        """Fetch the card of a deployment that is not known yet or may have changed, beside everything else."""
        is_settled = entry.card is not None and time.monotonic() > entry.settles
        if is_settled or (entry.asking and not entry.asking.done()):
            return

        async def ask() -> None:
            entry.card = await asyncio.wait_for(entry.handle.card.remote(), CARD_TIMEOUT_S)

        entry.asking = asyncio.get_running_loop().create_task(ask())
        entry.asking.add_done_callback(lambda task: task.cancelled() or task.exception())

    def cards(self) -> list[Card]:
        return [entry.card for _, entry in sorted(self.entries.items()) if entry.card is not None]

    def get(self, name: str) -> Entry:
        """ApiError 404 for a model that is not here, 503 for one that is still loading."""
        entry = self.entries.get(name)
        if entry is None:
            known = ", ".join(sorted(self.entries)) or "none"
            raise ApiError(404, f"There is no model {name[:80]!r} here; there is {known}.", "model", "model_not_found")
        if entry.card is None:
            raise ApiError(503, f"Model {name} is still loading.", "model", headers={"retry-after": "5"})
        return entry

    @contextmanager
    def admitted(self, entry: Entry, card: Card) -> Iterator[None]:
        """ApiError 429 where the queue is full; nothing has been done for the request by then."""
        most = card.capacity + self.limits.queue
        if entry.under_way >= most:
            self.metrics.refusals.inc(tags={"model": card.name})
            wait = max(self.limits.retry_after_s, min(120, round(entry.mean_s * entry.under_way / card.capacity)))
            raise ApiError(429, f"Model {card.name} has {most} requests to do already.", code="queue_full",
                           headers={"retry-after": str(wait)})
        entry.under_way += 1
        self.metrics.waiting.set(entry.under_way, tags={"model": card.name})
        begun = time.monotonic()
        try:
            yield
        finally:
            entry.under_way -= 1
            self.metrics.waiting.set(entry.under_way, tags={"model": card.name})
            entry.mean_s += 0.1 * (time.monotonic() - begun - entry.mean_s)
