"""Works the jobs off: a few of each model at a time, beside the requests that somebody waits for.

A job whose replica dies is begun again, as one whose server died; how often is a setting. Requests that carry an
Idempotency-Key go through the same store: one is made, whoever repeats it waits for it or gets its file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from avray.serving.directory import Directory
from avray.serving.generation import Generation, Work, encoded
from avray.serving.jobs import INPUT, OUTPUT, Job, JobStore
from avray.serving.refusals import ApiError
from avray.settings.serve import JobSettings

POLL_S = 0.5
EXPIRE_S = 60.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Result:
    data: bytes
    headers: dict[str, str]


@dataclass
class _Shared:
    digest: str
    task: asyncio.Task[Result]
    listeners: int = 0


@dataclass
class Progress:
    whole: float
    done: float = 0.0


class Worker:
    """``plan`` turns a job's document, and the file sent along, into Work; it raises what it would answer."""

    def __init__(self, settings: JobSettings, directory: Directory, generation: Generation,
                 plan: Callable[[Job, bytes | None], Work]) -> None:
        self.settings, self.directory, self.generation, self.plan = settings, directory, generation, plan
        self.store: JobStore | None = None
        self.thread = ThreadPoolExecutor(1, "jobs")
        self.running: dict[str, asyncio.Task[None]] = {}
        self.models: dict[str, str] = {}
        self.shared: dict[tuple[str, str], _Shared] = {}

    async def call(self, method: str, *arguments: Any) -> Any:
        """A method of the store, in its own thread; the store is opened at the first."""

        def work() -> Any:
            if self.store is None:
                self.store = JobStore(self.settings)
            return getattr(self.store, method)(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    async def run(self) -> None:
        """Until cancelled; then what was under way goes back into the queue."""
        expired = 0.0
        try:
            while True:
                try:
                    await self._claim()
                    if time.monotonic() > expired + EXPIRE_S:
                        await self.call("expire")
                        expired = time.monotonic()
                except Exception:
                    logger.exception("The store of jobs failed")
                await asyncio.sleep(POLL_S)
        finally:
            under_way = [*self.running.values()]
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _claim(self) -> None:
        self.models = {job_id: model for job_id, model in self.models.items() if job_id in self.running}
        for name, entry in list(self.directory.entries.items()):
            while entry.card is not None and [*self.models.values()].count(name) < self.settings.at_once:
                job = await self.call("claim", name)
                if job is None:
                    break
                self.models[job.id] = name
                self.running[job.id] = asyncio.create_task(self._work(job))

    async def _work(self, job: Job) -> None:
        try:
            await self._work_off(job)
        finally:
            self.running.pop(job.id, None)

    async def _work_off(self, job: Job) -> None:
        try:
            if job.attempts > self.settings.attempts:
                raise ApiError(500, f"The job was begun {self.settings.attempts} times and never ended.", code="lost")
            await self._make(job)
        except ApiError as error:
            if error.code == "replica_lost":
                await self.call("release", job.id, job.attempts)
            elif error.status in (429, 503):  # nothing was tried
                await self.call("release", job.id, job.attempts - 1)
            else:
                await self.call("finish", job, "failed", error.body())
        except asyncio.CancelledError:
            await asyncio.shield(self.call("release", job.id, job.attempts - 1))
            raise
        except Exception:
            logger.exception("A job failed")
            await self.call("finish", job, "failed", ApiError(500, "The server failed on this job.").body())

    async def _make(self, job: Job) -> None:
        assert self.store is not None
        source = self.store.path(job.id, INPUT)
        work = self.plan(job, await asyncio.to_thread(source.read_bytes) if source.exists() else None)
        parts, held = self.generation.parts(work, admit=False), []
        made = Progress(work.seconds)
        beating = asyncio.create_task(self._beat(job, made, asyncio.current_task()))
        try:
            async for part in parts:
                held.append(part)
                made.done += part.seconds
        finally:
            beating.cancel()
            await parts.aclose()  # type: ignore[attr-defined]
        data = await asyncio.to_thread(encoded, work, held)
        await asyncio.to_thread(self._write, job, data)
        headers = {**work.headers, "x-avray-checkpoint": held[-1].checkpoint, "content-type": work.media_type}
        await self.call("finish", job, "succeeded", {"headers": headers, "completed": int(time.time())})

    async def _beat(self, job: Job, made: Progress, work: asyncio.Task[None] | None) -> None:
        """Renew the lease while the job waits for a slot or is made; end it where somebody deleted it."""
        while await self.call("beat", job.id, min(0.99, made.done / made.whole)):
            await asyncio.sleep(min(1.0, self.settings.lease_s / 4))
        if work is not None:
            work.cancel()

    def _write(self, job: Job, data: bytes) -> None:
        """Whole or not at all; a job that was deleted meanwhile has no folder any more."""
        assert self.store is not None
        path = self.store.path(job.id, OUTPUT)
        if path.parent.is_dir():
            path.with_suffix(".part").write_bytes(data)
            os.replace(path.with_suffix(".part"), path)

    async def submit(self, job: Job, file: bytes | None) -> Job:
        """Accept a job; the same one again for a repeated Idempotency-Key. ApiError 429 where too many wait."""
        if job.key is not None and (known := await self._known(job.owner, job.key, job.digest)):
            return known
        if await self.call("waiting") >= self.settings.queue:
            raise ApiError(429, f"{self.settings.queue} jobs wait already.", code="queue_full",
                           headers={"retry-after": "30"})
        # Its file first: a job that can be claimed is complete.
        if not await self.call("add", job, file):
            assert job.key is not None
            return await self._known(job.owner, job.key, job.digest) or job
        return job

    async def _known(self, owner: str, key: str, digest: str | None) -> Job | None:
        job: Job | None = await self.call("by_key", owner, key)
        if job is not None and job.digest != digest:
            raise _other_body()
        return job

    async def once(self, owner: str, key: str, digest: str, work: Work) -> Result:
        """Generate for an Idempotency-Key: once, however often and at what time it is asked. The work ends when the
        last of those who wait for it leaves."""
        job = await self._known(owner, key, digest)
        if job is not None and job.state == "succeeded":
            assert self.store is not None
            data = await asyncio.to_thread(self.store.path(job.id, OUTPUT).read_bytes)
            return Result(data, dict(job.document["headers"]))
        if job is not None:
            raise ApiError(422, "This Idempotency-Key belongs to a job; ask /v1/jobs for it.", code="key_of_a_job")
        shared = self.shared.get((owner, key))
        if shared is None:
            shared = _Shared(digest, asyncio.create_task(self._once(owner, key, digest, work)))
            self.shared[owner, key] = shared
        elif shared.digest != digest:
            raise _other_body()
        shared.listeners += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.listeners -= 1
            if shared.listeners == 0:
                shared.task.cancel()
                self.shared.pop((owner, key), None)

    async def _once(self, owner: str, key: str, digest: str, work: Work) -> Result:
        data, last = await self.generation.whole(work)
        headers = {**work.headers, "x-avray-checkpoint": last.checkpoint, "content-type": work.media_type}
        job = Job(owner, work.card.name, {}, state="running", lease=time.time() + 3600, key=key, digest=digest)
        if await self.call("add", job, None):
            await asyncio.to_thread(self._write, job, data)
            await self.call("finish", job, "succeeded", {"headers": headers})
        return Result(data, headers)


def digest_of(route: str, body: dict[str, Any], file: bytes | None) -> str:
    return hashlib.sha256(json.dumps([route, body], sort_keys=True).encode() + b"\0" + (file or b"")).hexdigest()


def _other_body() -> ApiError:
    return ApiError(422, "This Idempotency-Key was used for another request.", code="idempotency_key_reused")
