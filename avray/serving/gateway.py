"""The one door: a FastAPI application that checks, admits and asks, and never imports torch.

It knows no family. A model's card says which routes it answers; the rest is a 400 that says where to go.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError

import avray
from avray.serving import refusals
from avray.serving.auth import Keys
from avray.serving.directory import Directory
from avray.serving.forms import read_form
from avray.serving.generation import Generation, StreamedSound, Work
from avray.serving.guard import Guard
from avray.serving.job_routes import add_job_routes, job_object, video_object
from avray.serving.jobs import Job
from avray.serving.messages import EMBEDDING_ROUTES, TEXT_ROUTES, VIDEO_ROUTES, Card, Part
from avray.serving.metrics import Metrics
from avray.serving.refusals import ApiError
from avray.serving.schema import (
    Completion,
    Embeddings,
    MediaEmbeddings,
    Sound,
    Speech,
    Transcription,
    Video,
    ask,
    check,
    described,
)
from avray.serving.sound import MEDIA_TYPES, rate_of
from avray.serving.worker import Worker, digest_of
from avray.settings.serve import ServeSettings

WEB = Path(__file__).parent / "web"
GENERATE, SPEECH, CONTINUATIONS = (f"/v1/audio/{name}" for name in ("generate", "speech", "continuations"))
COMPLETIONS, TRANSCRIPTIONS = TEXT_ROUTES
EMBEDDINGS, MEDIA_EMBEDDINGS = EMBEDDING_ROUTES
VIDEOS, VIDEOS_SYNC = VIDEO_ROUTES
Body = TypeVar("Body", bound=BaseModel)
BODIES: dict[str, type[Sound]] = {GENERATE: Sound, SPEECH: Speech, CONTINUATIONS: Sound, VIDEOS: Video,
                                  VIDEOS_SYNC: Video}


@dataclass(frozen=True)
class GatewaySettings:
    serve: ServeSettings
    keys: Keys


class Gateway:
    """The deployment's class: an ASGI application around a Directory. ``handles`` are models of its own application;
    without them it follows the applications that Serve has."""

    def __init__(self, settings: GatewaySettings, handles: dict[str, Any] | None = None) -> None:
        self.serve, self.keys = settings.serve, settings.keys
        self.metrics = Metrics()
        self.directory = Directory(self.serve.limits, self.metrics, handles)
        self.generation = Generation(self.directory, self.metrics)
        self.worker = Worker(self.serve.jobs, self.directory, self.generation, self._planned)

    def __serve_build_asgi_app__(self) -> Guard:
        return Guard(self.app(), self.keys, self.serve.limits, self.metrics)

    def app(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            tasks = [asyncio.create_task(task) for task in (self.directory.run(), self.worker.run())]
            yield
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        app = FastAPI(title="avray", version=avray.__version__, lifespan=lifespan)
        refusals.install(app)
        self._system_routes(app)
        self._sound_routes(app)
        self._text_routes(app)
        self._video_routes(app)
        self._embedding_routes(app)
        add_job_routes(app, self.worker)
        return app

    def _system_routes(self, app: FastAPI) -> None:
        @app.get("/", include_in_schema=False)
        async def playground() -> FileResponse:
            return FileResponse(WEB / "index.html", headers={"cache-control": "no-cache"})

        @app.get("/v1/health/live")
        async def live() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/v1/health/ready")
        async def ready() -> dict[str, str]:
            entries = self.directory.entries.values()
            if not entries or not all(entry.is_ready for entry in entries):
                raise ApiError(503, "Not every model is loaded yet.", headers={"retry-after": "5"})
            return {"status": "ok"}

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [model_object(card) for card in self.directory.cards()]}

        @app.get("/v1/models/{model}")
        async def model(model: str) -> dict[str, Any]:
            card = self.directory.get(model).card
            assert card is not None
            return model_object(card)

    def _sound_routes(self, app: FastAPI) -> None:
        @app.post(GENERATE, responses=SOUND)
        async def generate(body: Sound, request: Request) -> Response:
            return await self._sound(body, request, GENERATE)

        @app.post(SPEECH, responses=SOUND)
        async def speech(body: Speech, request: Request) -> Response:
            return await self._sound(body, request, SPEECH)

        @app.post(CONTINUATIONS, responses=SOUND, openapi_extra=multipart(Sound))
        async def continuations(request: Request) -> Response:
            body, file = await self._form(request, Sound)
            return await self._sound(body, request, CONTINUATIONS, file)

    def _text_routes(self, app: FastAPI) -> None:
        @app.post(COMPLETIONS)
        async def completions(body: Completion, request: Request) -> Response:
            said, last, headers = await self._text(body, request, COMPLETIONS)
            choice = {"index": 0, "text": said, "logprobs": None, "finish_reason": "stop"}
            return JSONResponse({"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
                                 "created": int(time.time()), "model": body.model, "choices": [choice]},
                                headers=headers)

        @app.post(TRANSCRIPTIONS, openapi_extra=multipart(Transcription))
        async def transcriptions(request: Request) -> Response:
            body, file = await self._form(request, Transcription)
            said, last, headers = await self._text(body, request, TRANSCRIPTIONS, file)
            if body.response_format == "text":
                return PlainTextResponse(said, headers=headers)
            more = {"task": "transcribe", "language": "unknown", "duration": last.heard_s, "segments": []}
            return JSONResponse({"text": said} | (more if body.response_format == "verbose_json" else {}),
                                headers=headers)

    def _video_routes(self, app: FastAPI) -> None:
        @app.post(VIDEOS, openapi_extra=either(Video))
        async def videos(request: Request) -> dict[str, Any]:
            body = await self._either(request, Video)
            if body.stream:
                raise ApiError(400, "A job's clip comes whole: /v1/videos/sync streams.", "stream")
            return video_object(await self._submit(self._work(body, VIDEOS, None), body, VIDEOS, request))

        @app.post(VIDEOS_SYNC, responses=CLIP, openapi_extra=either(Video))
        async def videos_sync(request: Request) -> Response:
            return await self._sound(await self._either(request, Video), request, VIDEOS_SYNC)

    def _embedding_routes(self, app: FastAPI) -> None:
        @app.post(EMBEDDINGS)
        async def embeddings(body: Embeddings, request: Request) -> dict[str, Any]:
            """What the model means by each text: the vector that it would play or show. Of a model whose embeddings
            are sequences, their mean."""
            texts = [body.input] if isinstance(body.input, str) else body.input
            asked = [Sound(model=body.model, input=text, task=body.task, seed=body.seed) for text in texts]
            works = [self._work(one, EMBEDDINGS, None) for one in asked]
            return await self._embedded(works, body, request)

        @app.post(MEDIA_EMBEDDINGS, openapi_extra=multipart(MediaEmbeddings))
        async def media_embeddings(request: Request) -> dict[str, Any]:
            """What the model's frozen network says of a recording or a clip, where ``/v1/embeddings`` puts texts."""
            body, file = await self._form(request, MediaEmbeddings)
            entry = self.directory.get(body.model)
            if entry.card is not None and len(entry.card.embeds) > 1 and body.task is None:
                raise ApiError(400, f"task is missing: the file is one of {', '.join(entry.card.embeds)}.", "task",
                               "missing_field")
            work = self._work(Sound(model=body.model, task=body.task), MEDIA_EMBEDDINGS, None)
            kind = {work.ask.task: file}
            ask = replace(work.ask, audio=kind.get("audio"), video=kind.get("video"))
            return await self._embedded([replace(work, ask=ask)], body, request)

    async def _embedded(self, works: Sequence[Work], body: Embeddings | MediaEmbeddings,
                        request: Request) -> dict[str, Any]:
        """A vector for each, as many at a time as the model has slots. ApiError for another number of dimensions."""
        request.scope["avray"]["log"] |= {"model": body.model}
        at_once = asyncio.Semaphore(works[0].card.slots)

        async def one(work: Work) -> np.ndarray:
            async with at_once:
                said, _ = await self.generation.text(replace(work, ask=replace(work.ask, embeds=True)))
            vector = np.atleast_2d(np.array(json.loads(said)["embedding"], "<f4")).mean(0)
            if body.dimensions not in (None, len(vector)):
                raise ApiError(400, f"dimensions is {body.dimensions}, and model {body.model} has {len(vector)}.",
                               "dimensions")
            return vector

        tasks = [asyncio.create_task(one(work)) for work in works]
        try:
            vectors = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        used = sum(len(work.ask.text or "") for work in works)
        written = [base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64"
                   else [round(float(number), 6) for number in vector] for vector in vectors]
        return {"object": "list", "model": body.model, "usage": {"prompt_tokens": used, "total_tokens": used},
                "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(written)]}

    async def _form(self, request: Request, fields: type[Body]) -> tuple[Body, bytes]:
        form = await read_form(request, self.serve.limits)
        body = validated(fields, form.fields)
        if form.file is None:
            raise ApiError(400, "file is missing: send the recording.", "file", "missing_field")
        return body, form.file

    async def _either(self, request: Request, fields: type[Body]) -> Body:
        """A body as JSON, or as the form that OpenAI's client sends even without a file."""
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            form = await read_form(request, self.serve.limits)
            if form.file is not None:
                raise ApiError(400, "No file is taken here, but a prompt.", "file")
            return validated(fields, form.fields)
        try:
            return fields.model_validate_json(await request.body())
        except ValidationError as error:
            raise refusals.from_validation(error.errors()) from None

    async def _text(self, body: Completion, request: Request, route: str,
                    audio: bytes | None = None) -> tuple[str, Part, dict[str, str]]:
        work = self._work(body, route, audio)
        request.scope["avray"]["log"] |= {"model": work.card.name, "seed": work.ask.seed}
        said, last = await self.generation.text(work)
        return said, last, {**work.headers, "x-avray-checkpoint": last.checkpoint}

    async def _sound(self, body: Sound, request: Request, route: str, audio: bytes | None = None) -> Response:
        log, owner = request.scope["avray"]["log"], request.scope["avray"]["owner"]
        given = body.model_dump(exclude_unset=True)
        work = self._work(body, route, audio)
        log |= {"model": work.card.name, "seed": work.ask.seed}
        if self.serve.log_prompts:
            log["prompt"] = body.input
        key = key_of(request)
        if "respond-async" in request.headers.get("prefer", "").lower():
            job = await self._submit(work, body, route, request, audio)
            return JSONResponse(job_object(job), 202, {"location": f"/v1/jobs/{job.id}",
                                                       "preference-applied": "respond-async"})
        if key is not None:
            if body.stream or body.stream_format:
                raise ApiError(400, "With an Idempotency-Key the sound comes whole: leave stream out.", "stream")
            result = await self.worker.once(owner, key, digest_of(route, given, audio), work)
            return Response(result.data, headers=result.headers)
        if not body.streams:
            data, last = await self.generation.whole(work)
            return Response(data, headers={**work.headers, "x-avray-checkpoint": last.checkpoint},
                            media_type=work.media_type)
        parts = self.generation.parts(work)
        try:
            first = await anext(parts)
        except BaseException:
            await parts.aclose()  # type: ignore[attr-defined]
            raise
        return StreamedSound(self.generation, work, parts, first, body.stream_format == "sse")

    async def _submit(self, work: Work, body: Sound, route: str, request: Request, audio: bytes | None = None) -> Job:
        given = body.model_dump(exclude_unset=True)
        document = {"route": route, "body": {**given, "seed": work.ask.seed}, "seconds": f"{work.seconds:g}",
                    "size": work.card.video_size}
        job = Job(request.scope["avray"]["owner"], work.card.name, document, key=key_of(request),
                  digest=digest_of(route, given, audio))
        return await self.worker.submit(job, audio)

    def _work(self, body: Sound, route: str, audio: bytes | None) -> Work:
        """What is to be made. ApiError for what cannot be."""
        entry = self.directory.get(body.model)
        card = entry.card
        assert card is not None
        if route not in card.routes:
            raise ApiError(400, f"Model {card.name} does not answer {route}, but "
                                f"{', '.join(card.routes) or 'nothing'}.", "model", "wrong_model")
        if card.tasks:
            body = body.model_copy(update={"task": task_of(body, card, route)})
        check(body, card, self.serve.limits)
        try:
            rate_hz = rate_of(body.response_format, body.sample_rate, card.sample_rate_hz)
        except ValueError as error:
            raise ApiError(400, str(error), "sample_rate") from None
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        headers = {"x-avray-seed": str(seed), "x-avray-model": card.name, "x-avray-sample-rate": str(rate_hz),
                   "x-avray-settings": json.dumps(described(body), separators=(",", ":"))}
        return Work(entry, card, ask(body, seed, audio), body.response_format, rate_hz, self.serve.note,
                    time.monotonic() + self.serve.limits.request_timeout_s, headers)

    def _planned(self, job: Job, file: bytes | None) -> Work:
        """A job's Work, as its request asked for it."""
        route = job.document["route"]
        body = BODIES[route].model_validate(job.document["body"])
        work = self._work(body, route, file)
        return replace(work, deadline=math.inf, ask=replace(work.ask, stream=True))


def validated(fields: type[Body], given: dict[str, Any]) -> Body:
    try:
        return fields.model_validate(given)
    except ValidationError as error:
        raise refusals.from_validation(error.errors()) from None


def key_of(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= 255:
        raise ApiError(400, "Idempotency-Key has from 1 to 255 characters.")
    return key


def task_of(body: Sound, card: Card, route: str) -> str:
    """The task asked for, or the route's first. ApiError for one that the route does not answer."""
    tasks = card.tasks_of(route)
    if body.task is not None and body.task not in tasks:
        raise ApiError(400, f"task {body.task!r} is not answered here; of model {card.name}, {route} takes "
                            f"{', '.join(tasks)}.", "task", "wrong_task")
    return body.task or tasks[0]


def model_object(card: Card) -> dict[str, Any]:
    """OpenAI's four fields, and what a client of avray wants to know beside them."""
    options = sorted({*itertools.chain(*card.options.values())})
    by_task = {task: sorted(card.options[task]) for task in card.tasks}
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "avray", "family": card.family,
            "modality": card.modality, "takes": card.takes, "tasks": card.tasks, "options": options,
            "task_options": by_task, "routes": card.routes, "sample_rate": card.sample_rate_hz,
            "default_seconds": card.segment_s, "step": card.step, "checkpoint": card.checkpoint}


def _files(description: str, kinds: set[str]) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, "content": {
        kind: {"schema": {"type": "string", "format": "binary"}} for kind in sorted(kinds)}}}


CLIP = _files("The clip.", {MEDIA_TYPES["mp4"]})
SOUND = _files("The sound, as response_format says.", {*MEDIA_TYPES.values()} - {MEDIA_TYPES["mp4"]})


def either(fields: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body that is JSON or a form."""
    content = {"schema": fields.model_json_schema()}
    return {"requestBody": {"required": True, "content": {"application/json": content,
                                                          "multipart/form-data": content}}}


def multipart(fields: type[BaseModel]) -> dict[str, Any]:
    """The schema of a form: a file, and the fields of ``fields``."""
    schema = fields.model_json_schema()
    schema["properties"] = {"file": {"type": "string", "format": "binary"}} | schema["properties"]
    schema["required"] = ["file", *schema["required"]]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
