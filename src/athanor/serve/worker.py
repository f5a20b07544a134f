"""The thread that drives the engine for the server.

The engine is not thread-safe, so one thread owns it: it takes commands (admit, drop, stop) from a thread-safe queue between two
steps and sends every chunk to the event loop that asked for it.

    event loop:  submit() --commands--> worker thread: add / abort / step --call_soon_threadsafe--> Stream --> response
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from athanor.core.errors import AthanorError
from athanor.types import Request

if TYPE_CHECKING:
    from athanor.infer.engine import Chunk, Engine

logger = logging.getLogger("athanor.serve")


class QueueFullError(AthanorError):
    """As many requests as the server takes at once are unfinished (the server answers 429)."""


class EngineFailedError(AthanorError):
    """The engine raised while this request was in flight (the server answers 500)."""


class StoppingError(AthanorError):
    """The server is going down (it answers 503)."""


class Stream:
    """The chunks of one submission (of one or more requests), read in the event loop that submitted it.

    `async for` ends when every request has its completion or after `close()`; it raises what made the requests fail.
    """

    def __init__(self, requests: Sequence[Request], drop: Callable[[Stream], object]) -> None:
        self.requests = tuple(requests)
        self._open = {request.id for request in requests}
        self._drop = drop
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Chunk | AthanorError | None] = asyncio.Queue()

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
        return item

    async def admitted(self) -> None:
        """Wait until the engine has taken the requests; raises what it refused them with."""
        item = await self._items.get()
        if isinstance(item, AthanorError):
            self._open.clear()
            raise item

    def close(self) -> None:
        """Leave: whatever is unfinished is aborted in the engine, and a reader of this stream ends."""
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


class Worker:
    """One background thread over one engine.

    engine     whatever has add(request), abort(id), step() -> chunks and has_work; nothing else may touch it meanwhile
    max_queue  unfinished requests, running and waiting together, before `submit` raises QueueFullError
    """

    def __init__(self, engine: Engine, *, max_queue: int = 256) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._slots = threading.BoundedSemaphore(max_queue)
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}  # by request id; only the thread touches it
        self._lock = threading.Lock()  # no command may follow the one that stops the thread
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="athanor-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._thread.is_alive() and not self._stopped

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

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Give requests to the engine, all or none, and return the stream of their chunks once they are accepted.

        Raises QueueFullError, StoppingError, EngineFailedError, or the RequestError of the engine.
        """
        for taken in range(len(requests)):
            if not self._slots.acquire(blocking=False):
                self._free(taken)
                raise QueueFullError(f"{self._max_queue} requests are in flight already, the most this server takes: retry later")
        stream = Stream(requests, self._leave)
        with self._lock:
            if self._stopped:
                self._free(len(requests))
                raise StoppingError("the server is shutting down")
            self._commands.put(partial(self._admit, stream))
        try:
            await stream.admitted()
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def _leave(self, stream: Stream) -> None:
        with self._lock:
            if not self._stopped:
                self._commands.put(partial(self._drop, stream))

    def _free(self, slots: int) -> None:
        for _ in range(slots):
            self._slots.release()

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
            if not stream.deliver(chunk):
                logger.warning("nobody is left to read the answer of %s", chunk.request_id)
                self._drop(stream)
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
        return len(mine)
