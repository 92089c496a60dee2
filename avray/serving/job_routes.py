"""``/v1/jobs``, ``/v1/videos``: how far a job is, its file, and its end. It answers to the key that made it alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from avray.serving.jobs import OUTPUT, Job
from avray.serving.refusals import ApiError
from avray.serving.worker import Worker

_RANGE = re.compile(rb"bytes=(\d{1,15})-(\d{0,15})|bytes=-(\d{1,15})")


def job_object(job: Job) -> dict[str, Any]:
    made = job.state == "succeeded"
    return {"id": job.id, "object": "job", "model": job.model, "status": job.state, "progress": round(job.progress, 3),
            "created_at": int(job.created), "expires_at": None if job.expires is None else int(job.expires),
            "error": job.document.get("error"), "content": f"/v1/jobs/{job.id}/content" if made else None}


def video_object(job: Job) -> dict[str, Any]:
    """The same in the form that OpenAI's client knows."""
    states = {"queued": "queued", "running": "in_progress", "succeeded": "completed", "failed": "failed"}
    error = job.document.get("error")
    return {"id": job.id, "object": "video", "model": job.model, "status": states[job.state],
            "progress": round(100 * job.progress), "created_at": int(job.created), "completed_at": job.document.get(
                "completed"), "expires_at": None if job.expires is None else int(job.expires),
            "error": error and {"code": error["code"] or error["type"], "message": error["message"]},
            "seconds": job.document["seconds"], "size": job.document["size"]}


def add_job_routes(app: FastAPI, worker: Worker) -> None:
    """Of jobs; and of those among them that make videos, under the names of OpenAI's."""
    _add_routes(app, worker, "/v1/jobs", job_object, "job")
    _add_routes(app, worker, "/v1/videos", video_object, "video.deleted")


def _add_routes(app: FastAPI, worker: Worker, prefix: str, described: Callable[[Job], dict[str, Any]],
                deleted: str) -> None:
    async def find(job_id: str, request: Request) -> Job:
        job: Job | None = await worker.call("get", job_id, request.scope["avray"]["owner"])
        if job is None or (prefix != "/v1/jobs" and job.document.get("route") != prefix):
            raise ApiError(404, "There is no such job; it may have expired.", code="job_not_found")
        return job

    @app.get(prefix + "/{job_id}")
    async def status(job_id: str, request: Request) -> dict[str, Any]:
        return described(await find(job_id, request))

    @app.get(prefix + "/{job_id}/content")
    async def content(job_id: str, request: Request) -> Response:
        job = await find(job_id, request)
        if job.state == "failed":
            raise ApiError(410, "The job failed; its status says why.", code="job_failed")
        if job.state != "succeeded":
            raise ApiError(404, "The job is not done yet.", code="job_not_done", headers={"retry-after": "1"})
        assert worker.store is not None
        data = await asyncio.to_thread(worker.store.path(job.id, OUTPUT).read_bytes)
        return ranged(data, request.headers.get("range"), job.document["headers"])

    @app.delete(prefix + "/{job_id}")
    async def delete(job_id: str, request: Request) -> dict[str, Any]:
        job = await find(job_id, request)
        task = worker.running.get(job.id)
        await worker.call("delete", job.id)
        if task is not None:
            task.cancel()
        return {"id": job.id, "object": deleted, "deleted": True}


def ranged(data: bytes, wanted: str | None, headers: dict[str, str]) -> Response:
    """The whole, or one range of it. ApiError 416 for any other form of Range."""
    headers = {**headers, "accept-ranges": "bytes"}
    if wanted is None:
        return Response(data, headers=headers)
    match = _RANGE.fullmatch(wanted.encode("latin-1", "replace"))
    refusal = ApiError(416, "The range must be one of bytes=first-last within the file.",
                       headers={"content-range": f"bytes */{len(data)}"})
    if match is None:
        raise refusal
    first, last, suffix = (int(group) if group else None for group in match.groups())
    begin = max(0, len(data) - suffix) if suffix is not None else first or 0
    end = min(len(data) - 1, last) if last is not None else len(data) - 1
    if begin >= len(data) or end < begin or suffix == 0:
        raise refusal
    return Response(data[begin : end + 1], 206, {**headers, "content-range": f"bytes {begin}-{end}/{len(data)}"})
