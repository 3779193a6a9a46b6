"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from soma.base.errors import UserError
from soma.engine.errors import EngineClosedError, EngineRestartingError, QueueFullError, RequestError

log = logging.getLogger("soma.serve")

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: int | None = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after
        self.headers = headers or {}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """What the client is told about an exception; nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(404 if error.code == "model_not_found" else 400, str(error), error.param, error.code)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineRestartingError):
        return ApiError(503, str(error), code="engine_restarting", retry_after=error.retry_after)
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the service is shutting down; try again soon", code="shutting_down", retry_after=5)
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def error_response(error: ApiError, path: str) -> dict[str, Any]:
    """The JSON of an error in the shape of the protocol that has this path: `/v2/` is the Open Inference Protocol's."""
    if path == "/v2" or path.startswith("/v2/"):
        return {"error": error.message}
    return error_body(error.status, error.message, error.param, error.code)


def respond(error: ApiError, path: str = "") -> JSONResponse:
    """The HTTP response of an error to a request for this path."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    headers |= error.headers
    return JSONResponse(error_response(error, path), error.status, headers)


def log_unknown(error: Exception) -> None:
    """Put what the client is not told into the log."""
    if not isinstance(error, ApiError):
        log.error("a stream failed", exc_info=error)


def sse_error(error: Exception) -> bytes:
    """An error in the middle of a stream, as the openai client expects it: an event with an `error` key."""
    known = as_api_error(error)
    return b"data: " + json.dumps(error_body(known.status, known.message, known.param, known.code)).encode() + b"\n\n"


def install(app: FastAPI) -> None:
    """Give every error of the application OpenAI's shape."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return respond(as_api_error(error), request.url.path)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return respond(ApiError(error.status_code, str(error.detail)), request.url.path)

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
        return respond(as_api_error(error), request.url.path)

    for kind in (ApiError, UserError, QueueFullError, EngineClosedError, EngineRestartingError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)
