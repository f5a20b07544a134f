"""What every request of the server passes: an id, a limit on its body, and one shape for all errors."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from athanor.core.errors import AthanorError, RequestError
from athanor.serve.protocol import error_body
from athanor.serve.worker import EngineFailedError, QueueFullError, StoppingError

logger = logging.getLogger("athanor.serve")

MAX_BODY = 2**20  # bytes
_DRAIN = 16 * MAX_BODY  # read and forgotten, so that a client that is still sending hears the answer
_RETRY_AFTER = {"Retry-After": "1"}  # seconds
_KINDS = {404: "not_found_error", 429: "rate_limit_error"}  # OpenAI's words for `type`


class ApiError(AthanorError):
    """An answer with an error status other than 400 (which is RequestError's)."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


async def read_body(request: Request) -> bytes:
    """The body, counted while it is read, so that a chunked one without a length is bounded too.

    Raises ApiError 415 when it is not declared as JSON (a web page could otherwise post here unasked), 413 when it is too long.
    """
    declared = request.headers.get("content-type", "")
    if declared.split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type is {declared[:80]!r}: send 'Content-Type: application/json'")
    body, length = bytearray(), 0
    async for piece in request.stream():
        length += len(piece)
        if length > _DRAIN:
            break
        if length <= MAX_BODY:
            body += piece
    if length > MAX_BODY:
        raise ApiError(413, f"the body is longer than {MAX_BODY:,} bytes, the most this server reads: shorten the messages")
    return bytes(body)


def error_response(error: Exception, request_id: str) -> JSONResponse:
    """The response for `error`. One that is not meant for users says no more than the id under which it is logged."""
    match error:
        case RequestError():
            return _response(400, str(error), error.param)
        case ApiError():
            return _response(error.status, str(error), error.param, error.code)
        case QueueFullError():
            return _response(429, str(error), code="queue_full", headers=_RETRY_AFTER)
        case StoppingError():
            return _response(503, str(error), code="shutting_down")
        case HTTPException():
            return _response(error.status_code, str(error.detail), headers=error.headers)
    # The worker has logged what made the engine fail, once for all requests that it took along.
    logger.error("request %s failed: %s", request_id, error, exc_info=None if isinstance(error, EngineFailedError) else error)
    return _response(500, f"internal error; the server's log has it under the id {request_id}", code="internal_error")


def _response(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return JSONResponse(error_body(message, kind, param, code), status, headers)


def request_id_of(scope: Scope) -> str:
    """The id that `RequestGuard` gave this request."""
    request_id: str = scope["state"]["request_id"]
    return request_id


class RequestGuard:
    """ASGI middleware: gives each request an id, sent as `x-request-id`, and turns what escapes the handlers into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = scope.setdefault("state", {})["request_id"] = f"req-{uuid.uuid4().hex}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # while sending its request: nobody is there to answer
        except Exception as error:
            response = error_response(error, request_id)
            if started:
                raise  # the status is out already: all that is left is to break the connection
            await response(scope, receive, send_with_id)


def install(app: FastAPI) -> None:
    """Give `app` the guard and the error handlers."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, request_id_of(request.scope))

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        what = f"{request.method} {request.url.path[:80]}"
        if error.status_code == 404:
            routes = ", ".join(f"{'/'.join(sorted(r.methods or ()))} {r.path}" for r in app.routes if isinstance(r, Route))
            error = HTTPException(404, f"no route {what}: there are {routes}")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            error = HTTPException(405, f"{what} is not allowed: this path answers {allowed}", error.headers)
        return error_response(error, request_id_of(request.scope))

    app.add_exception_handler(AthanorError, known)
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]  # Starlette types every handler as taking Exception
    app.add_middleware(RequestGuard)
