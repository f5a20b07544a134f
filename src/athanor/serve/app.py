"""The OpenAI-compatible HTTP server over one engine.

    GET  /health                  200 when the engine works, 503 when it does not
    GET  /v1/models[/{id}]        the one model that is served
    POST /v1/chat/completions     whole or streamed (server-sent events)

The conversation is rendered by the same function as in training (law L1), so text of a user cannot become a control token.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from athanor import types
from athanor.core.errors import AthanorError, RequestError
from athanor.serve import guard
from athanor.serve.protocol import Answer, ChatRequest, model_body, parse_chat
from athanor.serve.worker import Stream, Worker
from athanor.tokenizer.chat import render

if TYPE_CHECKING:
    from athanor.infer.engine import Engine
    from athanor.tokenizer.vocabulary import Vocabulary

_CLIENT_LEFT = 499  # nginx's status for it; nobody receives it


def create_app(
    engine: Engine, tokenizer: Vocabulary, model_name: str, *, max_queue: int = 256, default_max_tokens: int | None = None
) -> FastAPI:
    """An application that serves `engine` as `model_name`; it alone may use the engine while it runs.

    max_queue           unfinished choices at once; more are answered 429
    default_max_tokens  new tokens where the client sets no limit; None is whatever the context has left
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.worker = worker = Worker(engine, max_queue=max_queue)
        worker.start()
        yield
        worker.stop()
        await asyncio.to_thread(worker.join)

    app = FastAPI(title="Athanor", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    guard.install(app)
    created = int(time.time())

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = app.state.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model_body(model_name, created, engine.max_len)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        check_model(name)
        return JSONResponse(model_body(model_name, created, engine.max_len))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        chat = parse_chat(await guard.read_body(request))
        check_model(chat.model)
        # Encoding a long text takes a while and would hold up everybody's stream.
        requests = await asyncio.to_thread(requests_of, chat)
        answer = Answer(requests[0].id.rpartition("-")[0], model_name)
        stream = await app.state.worker.submit(requests)
        if chat.stream:
            events = _events(stream, answer, chat.include_usage, guard.request_id_of(request.scope))
            return _ChatStream(stream, events)
        completions = await _collect(stream, request)
        return Response(status_code=_CLIENT_LEFT) if completions is None else JSONResponse(answer.whole(completions))

    def check_model(name: str) -> None:
        if name != model_name:
            raise guard.ApiError(404, f"no model {name[:80]!r}: this server has {model_name!r}", "model", "model_not_found")

    def requests_of(chat: ChatRequest) -> list[types.Request]:
        prompt_ids = render(tokenizer, chat.conversation(), generation_prompt=True).ids
        max_tokens = _limit(chat, len(prompt_ids), engine.max_len, default_max_tokens)
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        return [types.Request(f"{answer_id}-{i}", prompt_ids, p) for i, p in enumerate(chat.sampling(max_tokens))]

    return app


def _limit(chat: ChatRequest, prompt: int, context: int, default: int | None) -> int:
    """How many tokens an answer may have. Raises RequestError when prompt and answer do not fit into the context."""
    left = context - prompt
    if left < 1:
        raise RequestError(
            f"the messages are {prompt} tokens long, but the context has {context} for them and the answer: shorten them",
            "messages",
        )
    if chat.limit is None:
        return left if default is None else min(default, left)
    if chat.limit > left:
        raise RequestError(
            f"{chat.limit_field} ({chat.limit}) is more than the {left} tokens that the messages ({prompt} tokens) leave of the"
            f" context ({context}): lower it, leave it out, or shorten the messages",
            chat.limit_field,
        )
    return chat.limit


async def _collect(stream: Stream, request: Request) -> list[types.Completion] | None:
    """The completions of all choices in order; None when the client left before they were ready."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stream.close()

    watcher = asyncio.create_task(watch())
    done: dict[str, types.Completion] = {}
    try:
        async for chunk in stream:
            if chunk.completion is not None:
                done[chunk.request_id] = chunk.completion
    finally:
        watcher.cancel()
        stream.close()
    return _in_order(stream, done) if len(done) == len(stream.requests) else None


def _in_order(stream: Stream, done: dict[str, types.Completion]) -> list[types.Completion]:
    return [done[request.id] for request in stream.requests]


async def _events(stream: Stream, answer: Answer, include_usage: bool, request_id: str) -> AsyncIterator[ServerSentEvent]:
    """The events of a streamed answer. An error after the start is an event too, and then no [DONE] follows."""
    index = {request.id: i for i, request in enumerate(stream.requests)}
    done: dict[str, types.Completion] = {}
    for i in index.values():
        yield _event(answer.opening(i))
    try:
        async for chunk in stream:
            i = index[chunk.request_id]
            if chunk.content or chunk.reasoning:
                yield _event(answer.delta(i, chunk.content, chunk.reasoning))
            if chunk.completion is not None:
                done[chunk.request_id] = chunk.completion
                yield _event(answer.closing(i, chunk.completion))
    except AthanorError as error:
        yield _event(bytes(guard.error_response(error, request_id).body).decode())
        return
    if include_usage:
        yield _event(answer.usage(_in_order(stream, done)))
    yield _event("[DONE]")


def _event(data: str) -> ServerSentEvent:
    return ServerSentEvent(data, sep="\n")


class _ChatStream(EventSourceResponse):
    """Server-sent events that leave nothing behind in the engine, however the response ends."""

    def __init__(self, stream: Stream, events: AsyncIterator[ServerSentEvent]) -> None:
        # A shutdown waits for answers in flight, as it does for those that are not streamed; stopping the worker ends both.
        super().__init__(events, shutdown_grace_period=math.inf)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()
