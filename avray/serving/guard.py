"""What every request passes before it reaches a route: an id, a key, bounds on its body; and the log line after it.

Plain ASGI, because FastAPI's middleware would buffer streams. Requests without a key are let in only through loopback,
whatever the server was told to listen on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from avray.serving.auth import Keys
from avray.serving.metrics import Metrics
from avray.serving.refusals import ApiError
from avray.settings.serve import LimitSettings, is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

logger = logging.getLogger("ray.serve")
OPEN = "/v1/health/"
"""Paths that need no key begin like this."""
PAGES = ("/", "/docs", "/openapi.json")


class Guard:
    """The outermost layer. ``scope["avray"]`` gets the request's id, its owner, and what to log."""

    def __init__(self, app: App, keys: Keys, limits: LimitSettings, metrics: Metrics) -> None:
        self.app, self.keys, self.limits, self.metrics = app, keys, limits, metrics
        self.recent: dict[str, deque[float]] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128]  # Serve's proxy makes and echoes it
        notes = scope["avray"] = {"request_id": request_id, "owner": "", "log": {}}
        begun, status, started, ended = time.monotonic(), 0, False, False

        async def answer(message: Message) -> None:
            nonlocal status, started, ended
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            notes["owner"] = self._let_in(scope, headers)
            bounded = BoundedBody(receive, headers, self.limits)

            async def answer_unless_refused(message: Message) -> None:
                if bounded.refused is None:  # of a refusal FastAPI makes a 400
                    await answer(message)

            await self.app(scope, bounded, answer_unless_refused)
            if bounded.refused is not None:
                raise bounded.refused
        except ApiError as error:
            if started:
                raise
            await error.response()(scope, receive, answer)
        except asyncio.CancelledError:
            status = 499
            raise
        except Exception:
            logger.exception("A request failed", extra={"avray_request_id": request_id})
            if started and not ended:  # a stream that fails must not end as if it had succeeded
                raise
            if not started:
                await ApiError(500, "The server failed on this request.").response()(scope, receive, answer)
        finally:
            self._log(scope, status, time.monotonic() - begun)

    def _let_in(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> str:
        if scope["path"].startswith(OPEN):
            return ""
        is_page = scope["path"] in PAGES and scope["method"] in ("GET", "HEAD")
        owner = self.keys.owner(headers.get(b"authorization"), is_page)
        if owner is None:
            challenge = 'Basic realm="avray: any name, and the key as password"' if is_page else "Bearer"
            raise ApiError(401, "Give a valid key: Authorization: Bearer …", headers={"www-authenticate": challenge})
        server = scope.get("server")
        if not self.keys.digests and server and not is_loopback(str(server[0])):
            raise ApiError(403, "This server has no keys, and without them it answers on loopback alone.")
        if self.limits.per_minute is not None and scope["method"] == "POST":
            self._count(owner, self.limits.per_minute)
        return owner

    def _count(self, owner: str, per_minute: int) -> None:
        """ApiError 429 where the owner's last minute is full."""
        now, recent = time.monotonic(), self.recent.setdefault(owner, deque())
        while recent and recent[0] < now - 60:
            recent.popleft()
        if len(recent) >= per_minute:
            wait = max(1, min(120, round(recent[0] + 60 - now)))
            raise ApiError(429, f"This key may make {per_minute} requests a minute.", code="rate_limit_exceeded",
                           headers={"retry-after": str(wait)})
        recent.append(now)

    def _log(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        notes = scope["avray"]
        route = getattr(scope.get("route"), "path", "other")
        entry = {"request_id": notes["request_id"], "method": scope["method"], "route": route, "status": status,
                 "seconds": round(seconds, 4), "owner": notes["owner"], **notes["log"]}
        self.metrics.requests.inc(tags={"model": notes["log"].get("model", ""), "route": route, "status": str(status)})
        if not scope["path"].startswith(OPEN):
            logger.info("request %s", json.dumps(entry))


class BoundedBody:
    """``receive`` with an end to what it takes in: bytes (413) and seconds (408)."""

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], limits: LimitSettings) -> None:
        self.receive, self.limits = receive, limits
        self.deadline = time.monotonic() + limits.body_timeout_s
        self.num_bytes, self.is_complete = 0, False
        self.refused: ApiError | None = None
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limits.body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.limits.body_bytes} bytes.",
                        headers={"connection": "close"})

    async def __call__(self) -> Message:
        if self.is_complete:
            return await self.receive()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self.deadline - time.monotonic()):
                message = await self.receive()
        except TimeoutError:
            self.refused = ApiError(408, f"The body did not arrive within {self.limits.body_timeout_s:g} s.",
                                    headers={"connection": "close", "x-should-retry": "false"})
            raise self.refused from None
        self.num_bytes += len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        if self.num_bytes > self.limits.body_bytes:
            self.refused = self._too_large()
            raise self.refused
        return message
