"""The one thread of a replica that calls torch: it drives the engine, and hands its outputs to the event loop.

A second calling thread would bring its own team of OpenMP threads. Commands wait in a queue and are heeded between two
steps, so that a request that is cancelled costs one step at most.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from avray.engine import Engine, Output
from avray.errors import DataError
from avray.family import Request

logger = logging.getLogger("ray.serve")


@dataclass
class Stream:
    """One request's outputs, as the event loop sees them. ``cancel`` it when nobody listens any more."""

    request: Request
    thread: EngineThread
    number: int
    outputs: list[Output] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    finished: bool = False

    def put(self, outputs: list[Output]) -> None:
        self.outputs += outputs
        self.finished = outputs[-1].done
        self.wake.set()

    async def batches(self) -> AsyncIterator[list[Output]]:
        """All that has come since the last time, until it is done."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            outputs, self.outputs = self.outputs, []
            yield outputs
            if outputs[-1].done:
                return

    def cancel(self) -> None:
        if not self.finished:
            self.thread.commands.put(("cancel", self))


class EngineThread(threading.Thread):
    """Builds the engine, then runs until ``close``. ``failures`` counts steps that failed since the last good one."""

    def __init__(self, build: Callable[[], Engine], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name="engine", daemon=True)
        self.build, self.loop = build, loop
        self.commands: queue.SimpleQueue[tuple[str, Stream | None]] = queue.SimpleQueue()
        self.ready: asyncio.Future[Engine] = loop.create_future()
        self.failures = 0
        self.steps = 0
        self.active = 0
        self._numbers = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._tickets: dict[int, int] = {}

    def submit(self, request: Request) -> Stream:
        stream = Stream(request, self, next(self._numbers))
        self.commands.put(("submit", stream))
        return stream

    def close(self) -> None:
        self.commands.put(("close", None))

    def run(self) -> None:
        try:
            engine = self.build()
        except BaseException as error:
            self._call(self.ready.set_exception, error)
            return
        self._call(self.ready.set_result, engine)
        while True:
            try:
                if not self._heed(engine):
                    return
                outputs = engine.step()
                self.failures = 0
            except Exception as error:
                self.failures += 1
                logger.exception("A step of the engine failed")
                outputs = self._abandon(engine, error)
            self.steps += 1
            self.active = len(engine.running)
            self._deliver(outputs)

    def _heed(self, engine: Engine) -> bool:
        """All commands that wait, or the next one when there is nothing else to do; False to stop."""
        while True:
            try:
                word, stream = self.commands.get(block=not engine.busy)
            except queue.Empty:
                return True
            if stream is None:
                return False
            if word == "submit":
                self._submit(engine, stream)
            else:
                ticket = self._tickets.pop(stream.number, None)
                if ticket is not None:
                    self._streams.pop(ticket, None)
                    engine.cancel(ticket)
            self.active = len(engine.running)

    def _submit(self, engine: Engine, stream: Stream) -> None:
        try:
            ticket = engine.submit(stream.request)
        except (ValueError, DataError) as error:
            self._call(stream.put, [Output(0, None, True, error)])
        else:
            self._streams[ticket], self._tickets[stream.number] = stream, ticket

    def _abandon(self, engine: Engine, error: Exception) -> list[Output]:
        """Every request ends with the error, and the engine is empty again."""
        tickets = [*self._streams]
        for ticket in tickets:
            engine.cancel(ticket)
        return [Output(ticket, None, True, error) for ticket in tickets]

    def _deliver(self, outputs: list[Output]) -> None:
        by_stream: dict[int, list[Output]] = {}
        for output in outputs:
            by_stream.setdefault(output.ticket, []).append(output)
        batches = []
        for ticket, its_outputs in by_stream.items():
            stream = self._streams.get(ticket)
            if stream is None:
                continue
            batches.append((stream, its_outputs))
            if its_outputs[-1].done:
                del self._streams[ticket], self._tickets[stream.number]
        if batches:
            self._call(_put_all, batches)

    def _call(self, function: Callable[[Any], Any], value: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, value)
        except RuntimeError:  # the loop has ended, and nobody listens
            self.close()


def _put_all(batches: list[tuple[Stream, list[Output]]]) -> None:
    for stream, outputs in batches:
        stream.put(outputs)
