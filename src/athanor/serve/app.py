"""The OpenAI-compatible HTTP server over one or more engines.

    GET  /health /version /load /metrics /openapi.json
    GET  /v1/models[/{id}]
    POST /v1/chat/completions, /v1/completions, /v1/responses     whole or streamed (server-sent events)
    POST /v1/embeddings, /tokenize, /detokenize

A conversation is rendered by the same function as in training (law L1), so text of a user cannot become a control token.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

import athanor
from athanor import types
from athanor.core.errors import ConfigError, RequestError
from athanor.serve import events, guard, prompts
from athanor.serve.body import read
from athanor.serve.completions import CompletionRequest, TextWriter
from athanor.serve.describe import description
from athanor.serve.embeddings import AT_ONCE, EmbeddingRequest, check_lengths, vectors_body
from athanor.serve.metrics import Metrics
from athanor.serve.models import Models, Running, Served
from athanor.serve.protocol import Answer, parse_chat
from athanor.serve.responses import ResponseRequest, ResponseWriter
from athanor.serve.shapes import Teller
from athanor.serve.tokens import DetokenizeRequest, TokenizeRequest
from athanor.serve.worker import DeadlineError

if TYPE_CHECKING:
    from athanor.infer.engine import Engine
    from athanor.tokenizer.vocabulary import Vocabulary

_CLIENT_LEFT = 499  # nginx's status for it; nobody receives it


@dataclass(frozen=True)
class Options:
    """How a server works.

    max_queue           unfinished choices of a model at once; more are answered 429
    default_max_tokens  new tokens of a chat where the client sets no limit; None is whatever the context has left
    timeout             seconds that an answer may take, waiting included; None is for ever
    api_keys            of them, clients must send one; () asks for none
    public              paths beside /health that ask for no key
    """

    max_queue: int = 256
    default_max_tokens: int | None = None
    timeout: float | None = None
    api_keys: tuple[str, ...] = ()
    public: frozenset[str] = frozenset()


class _Writer(events.Writer, Protocol):
    def whole(self, completions: Sequence[types.Completion]) -> Any:
        """The body of an answer that is not streamed."""
        ...


def create_app(engine: Engine, tokenizer: Vocabulary, model_name: str, **options: Any) -> FastAPI:
    """An application that serves one engine as `model_name`; `options` are those of `Options`."""
    return create_server([Served(model_name, tokenizer, engine)], Options(**options))


def create_server(served: Sequence[Served], options: Options | None = None) -> FastAPI:
    """An application that serves several models by name; it alone may use their engines while it runs.

    Raises ConfigError when there is none, or when two have one name.
    """
    options = options or Options()
    metrics = Metrics()
    models = Models(served, metrics, options.max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        models.stop()
        await models.join()

    app = FastAPI(title="Athanor", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.models = models
    guard.install(app, options.api_keys, options.public)
    about = description([model.served.name for model in models.all], keys=bool(options.api_keys))

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if models.alive else "stopped"}, 200 if models.alive else 503)

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse({"version": athanor.__version__})

    @app.get("/load")
    async def load() -> JSONResponse:
        return JSONResponse({"server_load": models.unfinished})

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    async def openapi() -> JSONResponse:
        return JSONResponse(about)

    @app.get("/v1/models")
    async def listed() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model.body for model in models.all]})

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> JSONResponse:
        return JSONResponse(models.find(name).body)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        chat = parse_chat(await guard.read_body(request))
        model = models.find(chat.model)
        ready = await asyncio.to_thread(prompts.of_chat, chat, model.served, options.default_max_tokens)
        return await answer(request, model, ready, Answer(ready.id, chat, model.served.tokenizer, ready.truncated), chat.stream)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = read(await guard.read_body(request), CompletionRequest)
        model = models.find(asked.model)
        ready = await asyncio.to_thread(prompts.of_completion, asked, model.served)
        return await answer(
            request, model, ready, TextWriter(ready.id, asked, model.served.tokenizer, ready.truncated), asked.stream
        )

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        asked = read(await guard.read_body(request), ResponseRequest)
        model = models.find(asked.model)
        seed = secrets.randbits(62)
        ready = await asyncio.to_thread(prompts.of_response, asked, model.served, options.default_max_tokens, seed)
        writer = ResponseWriter(ready.id, asked, model.served.tokenizer, model.served.think)
        return await answer(request, model, ready, writer, asked.stream)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        asked = read(await guard.read_body(request), EmbeddingRequest)
        model = models.find(asked.model)
        try:
            found = await asyncio.wait_for(_embed(asked, model, request), options.timeout)
        except asyncio.TimeoutError:
            raise DeadlineError(
                f"the vectors took longer than the {options.timeout:g} s that this server gives an answer"
            ) from None
        return Response(status_code=_CLIENT_LEFT) if found is None else JSONResponse(vectors_body(asked, *found))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = read(await guard.read_body(request), TokenizeRequest)
        served = models.find(asked.model).served
        ids = await asyncio.to_thread(prompts.tokens_of, asked, served)
        body = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
        return JSONResponse(
            {**body, "token_strs": list(map(Teller(served.tokenizer).text, ids))} if asked.return_token_strs else body
        )

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = read(await guard.read_body(request), DetokenizeRequest)
        served = models.find(asked.model).served
        prompts.check_ids({"tokens": asked.tokens}, served.tokenizer.vocab_size)
        return JSONResponse({"prompt": await asyncio.to_thread(served.tokenizer.decode, asked.tokens)})

    async def answer(request: Request, model: Running, ready: prompts.Prepared, writer: _Writer, stream: bool) -> Response:
        request_id, note = guard.request_id_of(request.scope), guard.note_of(request.scope)
        note.update(model=model.served.name, answer=ready.id)

        def ended(done: Sequence[types.Completion]) -> None:
            note.update(prompt_tokens=len(done[0].prompt_ids), completion_tokens=sum(len(c.ids) for c in done))

        chunks = await model.worker.submit(ready.requests, options.timeout)
        if stream:
            said = events.events(chunks, writer, lambda error: guard.error_of(error, request_id), ended)
            return events.EventStream(chunks, said)
        done = await events.collect(chunks, request)
        if done is None:
            return Response(status_code=_CLIENT_LEFT)
        ended(done)
        return JSONResponse(writer.whole(done))

    return app


async def _embed(asked: EmbeddingRequest, model: Running, request: Request) -> tuple[torch.Tensor, int] | None:
    """Vectors of all texts and the number of their tokens; None when the client left.

    A few texts at a time, in the engine's thread: answers in flight wait for no more than that.
    """
    lm = model.served.lm
    if lm is None:
        raise RequestError(f"model {model.served.name!r} gives no vectors: name another", "model")
    lengths = [len(ids) for ids in await asyncio.to_thread(lambda: [lm.prompt_ids(text) for text in asked.texts])]
    context: int = lm.config.max_positions
    check_lengths(lengths, min(context, (lm.pooling and lm.pooling.max_length) or context))

    def vectors(texts: Sequence[str]) -> Callable[[], torch.Tensor]:
        def work() -> torch.Tensor:
            try:
                return lm.embed(texts)
            except ConfigError as error:
                raise RequestError(str(error), "input") from error

        return work

    found = []
    for i in range(0, len(asked.texts), AT_ONCE):
        if await request.is_disconnected():
            return None
        found.append(await model.worker.call(vectors(asked.texts[i : i + AT_ONCE])))
    return torch.cat(found), sum(lengths)
