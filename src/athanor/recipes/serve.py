"""Serve a model over HTTP, OpenAI-compatible.

Example: `athanor serve runs/first --checkpoint int8 --port 8000`
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import uvicorn

import athanor
from athanor.core.errors import ConfigError
from athanor.serve.app import create_app
from athanor.serve.worker import Worker
from athanor.tokenizer.chat import ours

GRACE = 20  # seconds that answers in flight have to finish once the server is told to stop
POSITIONAL = ("path",)


@dataclass(frozen=True)
class Config:
    path: Path
    """A run folder (runs/first) or one checkpoint of it (runs/first/rl)."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl, int8, int4 ...; by default the run's own choice."""
    host: str = "127.0.0.1"
    """Address to listen at. The server asks for no key: think before you choose one that others reach."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    max_batch: int = 64
    """Answers that are computed together at most."""
    max_queue: int = 256
    """Unfinished answers, waiting ones included, beyond which clients are told to come back later (429)."""
    max_tokens: int | None = None
    """Length of an answer where the client sets no limit, in tokens; by default what the context has left."""


def main(config: Config) -> None:
    for field in ("max_batch", "max_queue", "max_tokens"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ConfigError(f"{field} is {value}, but must be at least 1: raise it")
    with _listen(config.host, config.port) as listener:
        lm = athanor.load(config.path, config.checkpoint)
        app = create_app(
            lm.engine(max_batch=config.max_batch),
            ours(lm.tokenizer),
            lm.name,
            max_queue=config.max_queue,
            default_max_tokens=config.max_tokens,
        )
        url = _url(listener)
        print(f"Serving {lm.name!r} at {url}/v1 (Ctrl-C stops). Try:\n")
        print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\")
        print(f'    -d \'{{"model": "{lm.name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n', flush=True)
        server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE + 5))
        # uvicorn raises the signal that stopped it once more at its end; being told to stop is no failure.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print("Stopped.", file=sys.stderr)


class _Server(uvicorn.Server):
    """Gives answers in flight `GRACE` seconds; what is unfinished then ends with an error, not as if it were complete."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        worker: Worker = self.config.app.state.worker  # type: ignore[union-attr]  # `app` is our FastAPI
        asyncio.get_running_loop().call_later(GRACE, worker.stop)
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at host and port. Raises ConfigError when that cannot be had."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"port is {port}, but must be 0 to 65535: choose one from 1024 up, or 0 for a free one")
    try:
        # With the protocol number that it gives: asyncio leaves Nagle's algorithm on for a socket that does not say it is TCP,
        # and then every answer takes 40 ms more.
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen at host {host!r}, port {port}: {error}; check --host and --port") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen at host {host!r}, port {port}: {error}; choose others with --host and --port"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
