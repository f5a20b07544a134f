"""From the chunks of the engine to a whole answer, or to server-sent events, whoever puts them into words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from athanor.core.errors import AthanorError
from athanor.serve.shapes import ErrorBody
from athanor.types import Completion

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import Request

    from athanor.infer.engine import Chunk
    from athanor.serve.worker import Stream

Event = ServerSentEvent


def data(text: str, name: str | None = None) -> Event:
    """One event."""
    return ServerSentEvent(text, event=name, sep="\n")


class Writer(Protocol):
    """Puts an answer into the words of one protocol."""

    def opening(self, prompts: Sequence[Sequence[int]]) -> Iterator[Event]:
        """What comes before the first token; `prompts` of the choices."""
        ...

    def chunk(self, index: int, chunk: Chunk, prompt: int) -> Iterator[Event]:
        """What is new of choice `index`, whose prompt has `prompt` tokens."""
        ...

    def ending(self, completions: Sequence[Completion]) -> Iterator[Event]:
        """What comes after all choices."""
        ...

    def failed(self, body: ErrorBody) -> Iterator[Event]:
        """What ends a stream instead."""
        ...


async def collect(stream: Stream, request: Request) -> list[Completion] | None:
    """The completions of all choices in order; None when the client left before they were ready."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stream.close()

    watcher = asyncio.create_task(watch())
    done: dict[str, Completion] = {}
    try:
        async for chunk in stream:
            if chunk.completion is not None:
                done[chunk.request_id] = chunk.completion
    finally:
        watcher.cancel()
        stream.close()
    return _in_order(stream, done) if len(done) == len(stream.requests) else None


def _in_order(stream: Stream, done: dict[str, Completion]) -> list[Completion]:
    return [done[request.id] for request in stream.requests]


class EventStream(EventSourceResponse):
    """Server-sent events that leave nothing behind in the engine, however the response ends."""

    def __init__(self, stream: Stream, events: AsyncIterator[Event]) -> None:
        # A shutdown waits for answers in flight, as it does for those that are not streamed; stopping the worker ends both.
        super().__init__(events, shutdown_grace_period=math.inf)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


async def events(
    stream: Stream, writer: Writer, describe: Callable[[AthanorError], ErrorBody], ended: Callable[[list[Completion]], None]
) -> AsyncIterator[Event]:
    """The events of a streamed answer; an error after the start is one too. `ended` hears of the completions."""
    index = {request.id: i for i, request in enumerate(stream.requests)}
    done: dict[str, Completion] = {}
    for event in writer.opening([request.prompt_ids for request in stream.requests]):
        yield event
    try:
        async for chunk in stream:
            i = index[chunk.request_id]
            if chunk.completion is not None:
                done[chunk.request_id] = chunk.completion
            for event in writer.chunk(i, chunk, len(stream.requests[i].prompt_ids)):
                yield event
    except AthanorError as error:
        for event in writer.failed(describe(error)):
            yield event
        return
    completions = _in_order(stream, done)
    ended(completions)
    for event in writer.ending(completions):
        yield event
