"""The process that listens: what bounds a connection, and how it stops."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from athanor.serve import guard
from athanor.serve.models import Models

GRACE = 20.0  # seconds that answers in flight have to finish once the server is told to stop
LAST = 5  # seconds more that clients have to take the errors with which the others end


def settings(app: FastAPI, grace: float = GRACE) -> uvicorn.Config:
    """How it listens. Of uvicorn's two parsers, h11 bounds what it keeps of headers that do not end."""
    return uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(grace) + 2 * LAST,
        http="h11",
        h11_max_incomplete_event_size=2 * guard.MAX_HEADERS,
        ws="none",
        server_header=False,
    )


class Server(uvicorn.Server):
    """Gives answers in flight `grace` seconds, or until it is told to stop once more.

    What is unfinished then ends with an error, not as if it were complete. `LAST` seconds later connections are cut: of clients
    that do not read, and of those whose request has not come yet.
    """

    def __init__(self, config: uvicorn.Config, grace: float = GRACE) -> None:
        super().__init__(config)
        self.grace = grace

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        # Half a million objects of models and libraries, that stay: looking through them for garbage stops all answers for 0.3 s.
        gc.collect()
        gc.freeze()
        try:
            await super().serve(sockets)
        finally:
            gc.unfreeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._loop.call_soon_threadsafe(self._give_up)  # not here: what was interrupted may hold the worker's lock
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop.call_later(self.grace, self._give_up)
        await super().shutdown(sockets)

    def _give_up(self) -> None:
        models: Models = self.config.app.state.models  # type: ignore[union-attr]  # `app` is our FastAPI
        models.stop()
        self._loop.call_later(LAST, self._cut)

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
