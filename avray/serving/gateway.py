"""The one door: a FastAPI application that checks, admits and asks, and never imports torch.

It knows no family. A model's card says which routes it answers; the rest is a 400 that says where to go.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from pydantic import ValidationError

import avray
from avray.serving import refusals
from avray.serving.auth import Keys
from avray.serving.directory import Directory
from avray.serving.forms import read_form
from avray.serving.generation import Generation, Job, StreamedSound
from avray.serving.guard import Guard
from avray.serving.messages import Card
from avray.serving.metrics import Metrics
from avray.serving.refusals import ApiError
from avray.serving.schema import Sound, Speech, ask, check, described
from avray.serving.sound import MEDIA_TYPES, rate_of
from avray.settings.serve import ServeSettings

WEB = Path(__file__).parent / "web"
CONTINUATIONS = "/v1/audio/continuations"


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

    def __serve_build_asgi_app__(self) -> Guard:
        return Guard(self.app(), self.keys, self.serve.limits, self.metrics)

    def app(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            tasks = [asyncio.create_task(self.directory.run())]
            yield
            for task in tasks:
                task.cancel()

        app = FastAPI(title="avray", version=avray.__version__, lifespan=lifespan)
        refusals.install(app)
        self._system_routes(app)
        self._sound_routes(app)
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
        @app.post("/v1/audio/generate", responses=SOUND)
        async def generate(body: Sound, request: Request) -> Response:
            return await self._sound(body, request, "/v1/audio/generate")

        @app.post("/v1/audio/speech", responses=SOUND)
        async def speech(body: Speech, request: Request) -> Response:
            return await self._sound(body, request, "/v1/audio/speech")

        @app.post(CONTINUATIONS, responses=SOUND, openapi_extra=multipart(Sound))
        async def continuations(request: Request) -> Response:
            form = await read_form(request, self.serve.limits)
            try:
                body = Sound.model_validate(form.fields)
            except ValidationError as error:
                raise refusals.from_validation(error.errors()) from None
            if form.file is None:
                raise ApiError(400, "file is missing: send the recording to continue.", "file", "missing_field")
            return await self._sound(body, request, CONTINUATIONS, form.file)

    async def _sound(self, body: Sound, request: Request, route: str, audio: bytes | None = None) -> Response:
        entry = self.directory.get(body.model)
        card = entry.card
        assert card is not None
        notes = request.scope["avray"]["log"]
        notes["model"] = card.name
        check(body, card, self.serve.limits, route)
        try:
            rate_hz = rate_of(body.response_format, body.sample_rate, card.sample_rate_hz)
        except ValueError as error:
            raise ApiError(400, str(error), "sample_rate") from None
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        notes |= {"seed": seed} | ({"prompt": body.input} if self.serve.log_prompts else {})
        headers = {"x-avray-seed": str(seed), "x-avray-model": card.name, "x-avray-sample-rate": str(rate_hz),
                   "x-avray-settings": json.dumps(described(body), separators=(",", ":"))}
        job = Job(entry, card, ask(body, seed, audio), body.response_format, rate_hz, self.serve.note,
                  time.monotonic() + self.serve.limits.request_timeout_s)
        if not body.streams:
            data, last = await self.generation.whole(job)
            return Response(data, headers=headers | {"x-avray-checkpoint": last.checkpoint},
                            media_type=MEDIA_TYPES[body.response_format])
        parts = self.generation.parts(job)
        try:
            first = await anext(parts)
        except BaseException:
            await parts.aclose()  # type: ignore[attr-defined]
            raise
        headers["x-avray-checkpoint"] = first.checkpoint
        return StreamedSound(self.generation, job, parts, first, headers, body.stream_format == "sse")


def model_object(card: Card) -> dict[str, Any]:
    """OpenAI's four fields, and what a client of avray wants to know beside them."""
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "avray", "family": card.family,
            "modality": card.modality, "takes": card.takes, "options": card.options, "routes": card.routes,
            "sample_rate": card.sample_rate_hz, "default_seconds": card.segment_s, "step": card.step,
            "checkpoint": card.checkpoint}


SOUND: dict[int | str, dict[str, Any]] = {200: {"description": "The sound, as response_format says.", "content": {
    kind: {"schema": {"type": "string", "format": "binary"}} for kind in sorted(set(MEDIA_TYPES.values()))}}}


def multipart(fields: type[Sound]) -> dict[str, Any]:
    """The schema of a form: a file, and the fields of ``fields``."""
    schema = fields.model_json_schema()
    schema["properties"] = {"file": {"type": "string", "format": "binary"}} | schema["properties"]
    schema["required"] = ["file", *schema["required"]]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
