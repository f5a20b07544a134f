"""The OpenAPI description, from the models by which bodies are read and the types of which answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

import athanor
from athanor.serve.body import Strict
from athanor.serve.completions import CompletionRequest, TextAnswer
from athanor.serve.embeddings import EmbeddingRequest, Embeddings
from athanor.serve.protocol import ChatAnswer, ChatRequest
from athanor.serve.responses import ResponseBody, ResponseRequest
from athanor.serve.shapes import ErrorBody, Json, Model, ModelList
from athanor.serve.tokens import Detokenized, DetokenizeRequest, TokenizeRequest, Tokens


class Health(TypedDict):
    status: str


class Version(TypedDict):
    version: str


class Load(TypedDict):
    server_load: int  # unfinished requests


@dataclass(frozen=True)
class Route:
    """One path. `answer` None: text; `body` None: GET; `streams`: whether it answers with events where that is asked for."""

    path: str
    summary: str
    answer: Any = None
    body: type[Strict] | None = None
    streams: bool = False


ROUTES = (
    Route("/health", "Whether the engines work", Health),
    Route("/version", "The version of Athanor", Version),
    Route("/load", "How many requests are unfinished", Load),
    Route("/metrics", "Counters and timings in Prometheus' text format"),
    Route("/openapi.json", "This description", dict[str, Any]),
    Route("/v1/models", "The models that are served", ModelList),
    Route("/v1/models/{name}", "One of them", Model),
    Route("/v1/chat/completions", "Answer a conversation", ChatAnswer, ChatRequest, True),
    Route("/v1/completions", "Continue texts", TextAnswer, CompletionRequest, True),
    Route("/v1/responses", "Answer a conversation, in the words of OpenAI's responses", ResponseBody, ResponseRequest, True),
    Route("/v1/embeddings", "Vectors of texts", Embeddings, EmbeddingRequest),
    Route("/tokenize", "Tokens of a text or a conversation", Tokens, TokenizeRequest),
    Route("/detokenize", "The text of tokens", Detokenized, DetokenizeRequest),
)
_ALWAYS = {"431": "Headers that are too long", "500": "A failure, logged under the id in x-request-id"}
_OF_BODIES = {
    "400": "A field that is missing, unknown, not supported or out of range",
    "404": "A model that is not served",
    "408": "A body that came too slowly",
    "413": "A body that is too long",
    "415": "A body that is not declared as JSON",
    "429": "Too many unfinished requests: come back later",
    "501": "What needs a library that this server has not",
    "503": "The server is shutting down",
    "504": "The answer took too long",
}

_EVENT: Json = {  # each of them
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}


def description(names: Sequence[str], *, keys: bool) -> Json:
    """The OpenAPI document of a server with the models `names`, which asks for a key or not."""
    kinds: list[Any] = [*(r.answer for r in ROUTES if r.answer), *(r.body for r in ROUTES if r.body), ErrorBody]
    modes = [(i, "validation", TypeAdapter(kind)) for i, kind in enumerate(kinds)]
    found, shared = TypeAdapter.json_schemas(modes, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]  # a literal
    schemas = shared["$defs"]
    schema = {kind: found[i, "validation"] for i, (kind) in enumerate(map(id, kinds))}
    for body in (r.body for r in ROUTES if r.body):
        field = schemas[body.__name__]["properties"]["model"]
        schemas[body.__name__]["properties"]["model"] = {"enum": [*names, None] if "anyOf" in field else list(names)}
    error = {"application/json": {"schema": schema[id(ErrorBody)]}}
    components: Json = {"schemas": schemas}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    paths: Json = {}
    for route in ROUTES:
        told = _ALWAYS | (_OF_BODIES if route.body else {})
        if route.path == "/health":
            told |= {"503": "An engine has stopped"}
        elif keys:
            told |= {"401": "No key, or a wrong one"}
        good: Json = {"text/plain": {"schema": {"type": "string"}}}
        if route.answer:
            good = {"application/json": {"schema": schema[id(route.answer)]}}
        if route.streams:
            good["text/event-stream"] = {"schema": _EVENT}
        operation: Json = {"summary": route.summary, "responses": {"200": {"description": "Done", "content": good}}}
        if "{name}" in route.path:
            told |= {"404": _OF_BODIES["404"]}
            named = {"type": "string", "enum": list(names)}
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": named}]
        if route.body:
            content = {"application/json": {"schema": schema[id(route.body)]}}
            operation["requestBody"] = {"required": True, "content": content}
        if keys and route.path != "/health":
            operation["security"] = [{"key": []}]
        operation["responses"] |= {status: {"description": text, "content": error} for status, text in told.items()}
        if route.path == "/health":
            operation["responses"]["503"]["content"] = good
        paths[route.path] = {"post" if route.body else "get": operation}
    info = {"title": "Athanor", "version": athanor.__version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}
