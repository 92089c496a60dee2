"""Every error of the server in the one shape that clients of OpenAI's API read, without paths, addresses or keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
         408: "body_timeout", 409: "conflict", 410: "expired", 413: "body_too_large", 415: "unsupported_media_type",
         416: "range_not_satisfiable", 429: "busy", 500: "internal_error", 503: "not_ready", 504: "deadline_exceeded"}


class ApiError(Exception):
    """What a route raises. ``message`` is one sentence; ``param`` the field as the client calls it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code or CODES.get(status)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        # A client that repeats a request that ran out of time only makes it worse.
        headers = {"x-should-retry": "false"} | self.headers if self.status == 504 else self.headers
        return JSONResponse(self.body(), self.status, headers)


def install(app: FastAPI) -> None:
    """Answer ApiErrors, FastAPI's own refusals and whatever else goes wrong in the one shape."""

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def starlette(request: Request, error: HTTPException) -> JSONResponse:
        message = {404: "There is nothing at this path.", 405: "This path does not take this method.",
                   400: "The body cannot be read."}.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def ours(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "The server failed on this request.").response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()


def from_validation(errors: Any) -> ApiError:
    """pydantic's first complaint as a 400 that names the field."""
    first = errors[0]
    where = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path", "header")]
    if first.get("type") in ("json_invalid", "model_attributes_type") or not where:
        return ApiError(400, "The body is no JSON object." if not where or first["type"] == "json_invalid"
                        else first["msg"] + ".")
    param, message = where[0], str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not a field of this route.", param, "unknown_field")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing.", param, "missing_field")
    return ApiError(400, f"{param}: {message[0].lower()}{message[1:]}.", param)
