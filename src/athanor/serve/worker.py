"""The thread that drives the engine for the server.

The engine is not thread-safe, so one thread owns it: it takes commands (admit, drop, stop) from a thread-safe queue between two
steps and sends every chunk to the event loop that asked for it.

    event loop:  submit() --commands--> worker thread: add / abort / step --call_soon_threadsafe--> Stream --> response

What else the model is asked for (vectors) runs there too, between two steps: `call`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from athanor.core.errors import AthanorError, NonFiniteError, RequestError
from athanor.types import Completion, Request

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk, Engine, Stats

logger = logging.getLogger("athanor.serve")
T = TypeVar("T")


class QueueFullError(AthanorError):
    """As many requests as the server takes at once are unfinished (the server answers 429)."""


class EngineFailedError(AthanorError):
    """The engine raised while this request was in flight, or made inf or nan of it (the server answers 500)."""


class StoppingError(AthanorError):
    """The server is going down (it answers 503)."""


class DeadlineError(AthanorError):
    """The request took longer than the server gives one (it answers 504)."""


class Watch(Protocol):
    """Who is told what the engine does; called in its thread."""

    def stepped(self, chunks: Sequence[Chunk], stats: Stats | None) -> None:
        """After each step; None where the engine keeps no count."""
        ...

    def dropped(self, request_ids: Sequence[str]) -> None:
        """These were given up before their end."""
        ...


class Idle:
    """Stands for the engine of a model that generates nothing."""

    has_work = False

    def add(self, request: Request) -> None:
        raise RequestError("this model generates no text: ask for embeddings, or name another model", "model")

    def abort(self, request_id: str) -> None:
        """It has none."""

    def step(self) -> list[Chunk]:
        return []


class Stream:
    """The chunks of one submission (of one or more requests), read in the event loop that submitted it.

    `async for` ends when every request has its completion or after `close()`; it raises what made the requests fail.
    `seconds` after it was made, the unfinished ones are aborted, and reading raises DeadlineError.
    """

    def __init__(self, requests: Sequence[Request], drop: Callable[[Stream], object], seconds: float | None = None) -> None:
        self.requests = tuple(requests)
        self._open = {request.id for request in requests}
        self._drop = drop
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Chunk | AthanorError | None] = asyncio.Queue()
        self._seconds = seconds
        self._alarm = None if seconds is None else self._loop.call_later(seconds, self._expire)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Chunk:
        if not self._open:
            raise StopAsyncIteration
        item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, AthanorError):
            self._open.clear()
            raise item
        if item.completion is not None:
            self._open.discard(item.request_id)
            if not self._open:
                self._silence()
        return item

    async def admitted(self) -> None:
        """Wait until the engine has taken the requests; raises what it refused them with."""
        item = await self._items.get()
        if isinstance(item, AthanorError):
            self._open.clear()
            self._silence()
            raise item

    def _expire(self) -> None:
        if self._open:
            self._items.put_nowait(
                DeadlineError(f"the answer took longer than the {self._seconds:g} s that this server gives one")
            )
            self._drop(self)

    def _silence(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    def abandon(self) -> None:
        """Forget the requests, which the engine has never seen."""
        self._silence()
        self._open.clear()

    def close(self) -> None:
        """Leave: whatever is unfinished is aborted in the engine, and a reader of this stream ends."""
        self._silence()
        if self._open:
            self._open.clear()
            self._items.put_nowait(None)
            self._drop(self)

    def deliver(self, item: Chunk | AthanorError | None) -> bool:
        """Hand `item` to the reader, from any thread; False when the reader's event loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            return False
        return True


def _wrong(completion: Completion | None) -> AthanorError | None:
    """What became of a request that could not be answered."""
    if completion is None or completion.error is None:
        return None
    if completion.spoilt:
        return EngineFailedError(str(NonFiniteError(completion.error)))
    return RequestError(completion.error, "response_format")


class Worker:
    """One background thread over one engine.

    engine     whatever has add(request), abort(id), step() -> chunks, has_work and, where it counts, stats(); nothing else may
               touch it meanwhile
    max_queue  unfinished requests, running and waiting together, before `submit` raises QueueFullError
    watch      is told of every step
    """

    def __init__(self, engine: Engine | Idle, *, max_queue: int = 256, watch: Watch | None = None) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._watch = watch
        self._stats: Callable[[], Stats] | None = getattr(engine, "stats", None)
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}  # by request id; only the thread touches it
        self._lock = threading.Lock()  # no command may follow the one that stops the thread
        self._taken = 0  # of max_queue
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="athanor-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._thread.is_alive() and not self._stopped

    @property
    def unfinished(self) -> int:
        """Requests that run or wait, and calls."""
        return self._taken

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, fail those in flight with StoppingError, end the thread. Does not wait: see `join`."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._commands.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    async def submit(self, requests: Sequence[Request], seconds: float | None = None) -> Stream:
        """Give requests to the engine, all or none, and return the stream of their chunks once they are accepted.

        Raises QueueFullError, StoppingError, EngineFailedError, the RequestError of the engine, or DeadlineError after `seconds`.
        """
        stream = Stream(requests, self._leave, seconds)
        try:
            self._command(partial(self._admit, stream), len(requests))
        except AthanorError:
            stream.abandon()
            raise
        try:
            await stream.admitted()
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    async def call(self, work: Callable[[], T]) -> T:
        """What `work` returns, done in the engine's thread between two steps. Raises as `submit` does, and what `work` raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._command(partial(self._carry_out, work, loop, future), 1)
        return await future

    def _command(self, command: Callable[[], object], slots: int) -> None:
        if slots > self._max_queue:
            raise RequestError(
                f"{slots} answers are asked for, and this server takes {self._max_queue} at once: ask for fewer in one request",
                "n",
            )
        with self._lock:
            if self._stopped:
                raise StoppingError("the server is shutting down")
            if self._taken + slots > self._max_queue:
                raise QueueFullError(
                    f"this server takes {self._max_queue} requests at once, and {self._taken} are in flight already: retry later"
                )
            self._taken += slots
            self._commands.put(command)

    def _free(self, slots: int) -> None:
        with self._lock:
            self._taken -= slots

    def _leave(self, stream: Stream) -> None:
        with self._lock:
            if not self._stopped:
                self._commands.put(partial(self._drop, stream))

    # What follows runs in the thread.

    def _run(self) -> None:
        stuck = False
        try:
            while self._obey(wait=stuck or not self._engine.has_work):
                # A failed step has failed every request: the next one may be worth a try, a busy loop is not.
                stuck = not self._advance()
        finally:
            with self._lock:
                self._stopped = True
            while not self._commands.empty():
                if command := self._commands.get():
                    command()
            self._fail(StoppingError("the server is shutting down"))

    def _obey(self, *, wait: bool) -> bool:
        """Carry out the commands that are there, after waiting for one if told so; False when it is to stop."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _advance(self) -> bool:
        if not self._engine.has_work:
            return True
        try:
            chunks = self._engine.step()
        except Exception:
            logger.exception("a step of the engine failed; requests in flight: %s", ", ".join(self._streams) or "none")
            self._fail(EngineFailedError("the engine failed while it worked on this request"))
            return False
        for chunk in chunks:
            stream = self._streams.get(chunk.request_id)
            if stream is None:
                continue  # aborted before this step
            if chunk.completion is not None:
                # Before the client hears of it: its next request must find the slot free.
                del self._streams[chunk.request_id]
                self._free(1)
            if not stream.deliver(_wrong(chunk.completion) or chunk):
                logger.warning("nobody is left to read the answer of %s", chunk.request_id)
                self._drop(stream)
        if self._watch is not None:
            self._watch.stepped(chunks, None if self._stats is None else self._stats())
        return True

    def _admit(self, stream: Stream) -> None:
        try:
            for request in stream.requests:
                self._engine.add(request)
                self._streams[request.id] = stream
        except AthanorError as error:
            self._refuse(stream, error)
        except Exception:
            logger.exception("the engine failed to take %s", stream.requests[0].id)
            self._refuse(stream, EngineFailedError("the engine failed to take this request"))
        else:
            stream.deliver(None)

    def _carry_out(self, work: Callable[[], T], loop: asyncio.AbstractEventLoop, future: asyncio.Future[T]) -> None:
        def settle(result: T | None, error: AthanorError | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # a result unless there is an error

        result, failed = None, None
        if not future.cancelled():
            try:
                result = work()
            except AthanorError as error:
                failed = error
            except Exception:
                logger.exception("a call beside the engine failed")
                failed = EngineFailedError("the model failed while it worked on this request")
        self._free(1)
        try:
            loop.call_soon_threadsafe(settle, result, failed)
        except RuntimeError:
            logger.warning("nobody is left to read the result of a call")

    def _refuse(self, stream: Stream, error: AthanorError) -> None:
        taken = self._drop(stream)
        self._free(len(stream.requests) - taken)
        stream.deliver(error)

    def _fail(self, error: AthanorError) -> None:
        for stream in set(self._streams.values()):
            self._drop(stream)
            stream.deliver(error)

    def _drop(self, stream: Stream) -> int:
        """Abort what the engine still has of `stream`; how many requests that were."""
        mine = [request.id for request in stream.requests if request.id in self._streams]
        for request_id in mine:
            del self._streams[request_id]
            try:
                self._engine.abort(request_id)
            except Exception:
                logger.exception("the engine failed to abort %s", request_id)
            self._free(1)
        if mine and self._watch is not None:
            self._watch.dropped(mine)
        return len(mine)
