"""What every request of the server passes: an id, a key, limits on headers and body, one shape for all errors, a log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from athanor.core.errors import AthanorError, ConfigError, MissingExtraError, RequestError
from athanor.serve.models import UnknownModelError
from athanor.serve.shapes import ErrorBody, Json, error_body
from athanor.serve.worker import DeadlineError, EngineFailedError, QueueFullError, StoppingError

logger = logging.getLogger("athanor.serve")
access = logging.getLogger("athanor.access")  # one JSON object a request, at level INFO

MAX_BODY = 2**20  # bytes
MAX_HEADERS = 2**14  # bytes, of all names and values together
BODY_SECONDS = 60.0  # that a client may take to send its body
OPEN = frozenset({"/health"})  # asks for no key: who watches over the server has none
_DRAIN = 16 * MAX_BODY  # read and forgotten, so that a client that is still sending hears the answer
_RETRY_AFTER = {"Retry-After": "1"}  # seconds
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # OpenAI's words for `type`


class ApiError(AthanorError):
    """An answer with an error status other than 400 (which is RequestError's)."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


async def read_body(request: Request) -> bytes:
    """The body, counted while it is read, so that a chunked one without a length is bounded too.

    Raises ApiError 415 when it is not declared as JSON (a web page could otherwise post here unasked), 413 when it is too long,
    408 when it does not come.
    """
    declared = request.headers.get("content-type", "")
    if declared.split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type is {declared[:80]!r}: send 'Content-Type: application/json'")
    try:
        body, length = await asyncio.wait_for(_read(request), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s: send it faster") from None
    if length > MAX_BODY:
        raise ApiError(413, f"the body is longer than {MAX_BODY:,} bytes, the most this server reads: shorten the messages")
    return bytes(body)


async def _read(request: Request) -> tuple[bytearray, int]:
    body, length = bytearray(), 0
    async for piece in request.stream():
        length += len(piece)
        if length > _DRAIN:
            break
        if length <= MAX_BODY:
            body += piece
    return body, length


def error_response(error: Exception, request_id: str) -> JSONResponse:
    """The response for `error`. One that is not meant for users says no more than the id under which it is logged."""
    match error:
        case UnknownModelError():
            return _response(404, str(error), error.param, "model_not_found")
        case RequestError():
            return _response(400, str(error), error.param)
        case ApiError():
            return _response(error.status, str(error), error.param, error.code)
        case QueueFullError():
            return _response(429, str(error), code="queue_full", headers=_RETRY_AFTER)
        case StoppingError():
            return _response(503, str(error), code="shutting_down")
        case MissingExtraError():
            return _response(501, str(error), code="not_installed")
        case DeadlineError():
            return _response(504, str(error), code="timeout")
        case HTTPException():
            return _response(error.status_code, str(error.detail), headers=error.headers)
    # The worker has logged what made the engine fail, once for all requests that it took along.
    logger.error("request %s failed: %s", request_id, error, exc_info=None if isinstance(error, EngineFailedError) else error)
    return _response(500, f"internal error; the server's log has it under the id {request_id}", code="internal_error")


def error_of(error: AthanorError, request_id: str) -> ErrorBody:
    """The body of `error_response` alone, for a stream whose status is out already."""
    body: ErrorBody = json.loads(bytes(error_response(error, request_id).body))
    return body


def _response(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return JSONResponse(error_body(message, kind, param, code), status, headers)


def request_id_of(scope: Scope) -> str:
    """The id that `RequestGuard` gave this request."""
    request_id: str = scope["state"]["request_id"]
    return request_id


def note_of(scope: Scope) -> Json:
    """What the access log is to say of this request beside what it says of all."""
    note: Json = scope["state"]["note"]
    return note


class RequestGuard:
    """ASGI middleware: refuses those without a key, gives each request an id, sent as `x-request-id`, turns what escapes the
    handlers into a 500, and writes the access log.

    keys    those that open the server; () opens it to all
    public  paths that are open without one
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str] = (), public: frozenset[str] = frozenset()) -> None:
        self.app, self._keys, self._open = app, [key.encode() for key in keys], OPEN | public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.perf_counter()
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = f"req-{uuid.uuid4().hex}"
        state["note"] = {}
        status, sent = 0, 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        try:
            refused = self._refusal(scope)
            if refused is None:
                await self.app(scope, receive, send_with_id)
            else:
                await refused(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # while sending its request: nobody is there to answer
        except Exception as error:
            response = error_response(error, request_id)
            if status:
                raise  # it is out already: all that is left is to break the connection
            await response(scope, receive, send_with_id)
        finally:
            if access.isEnabledFor(logging.INFO):
                access.info("%s", json.dumps(_line(scope, request_id, status, sent, time.perf_counter() - began)))

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            return _response(431, f"the headers are longer than {MAX_HEADERS:,} bytes, the most this server reads: send fewer")
        if not self._keys or scope["path"] in self._open:
            return None
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # All are compared, each in constant time: how long it takes tells nothing of a key.
        fits = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if scheme.lower() == "bearer" and any(fits):
            return None
        message = "this server asks for a key: send 'Authorization: Bearer KEY' with one that it knows"
        return _response(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _line(scope: Scope, request_id: str, status: int, sent: int, seconds: float) -> Json:
    """One entry of the access log. Texts and keys are not in it; status 0 is a client that left before the answer."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "client": scope["client"][0] if scope.get("client") else None,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 4),
        "bytes": sent,
        **scope["state"]["note"],
    }


@contextmanager
def access_to(path: Path | None) -> Iterator[None]:
    """Inside, the access log is written to `path`, if there is one. Raises ConfigError where that cannot be."""
    if path is None:
        yield
        return
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write access_log {str(path)!r}: {error.strerror}; choose another file") from error
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
    try:
        yield
    finally:
        access.removeHandler(handler)
        access.setLevel(logging.NOTSET)
        access.propagate = True
        handler.close()


def install(app: FastAPI, keys: Sequence[str] = (), public: frozenset[str] = frozenset()) -> None:
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
    app.add_middleware(RequestGuard, keys=keys, public=public)
