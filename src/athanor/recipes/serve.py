"""Serve models over HTTP, OpenAI-compatible.

Example: `athanor serve runs/first --checkpoint int8 --port 8000`
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import athanor
from athanor.core.device import Precision
from athanor.core.errors import ConfigError
from athanor.infer import speculative
from athanor.serve import guard, page, process
from athanor.serve.app import Options, create_server
from athanor.serve.models import Served

KEY = "ATHANOR_API_KEY"
POSITIONAL = ("paths",)


@dataclass(frozen=True)
class Config:
    paths: tuple[Path, ...]
    """Run folders (runs/first) or checkpoints of them (runs/first/rl); clients choose among several by name."""
    checkpoint: str | None = None
    """Which checkpoint of the run folders: base, sft, rl, int8, int4 ...; by default each run's own choice."""
    host: str = "127.0.0.1"
    """Address to listen at. Where others reach it, ask for a key."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    api_key: tuple[str, ...] = ()
    """Keys of which clients must send one. The environment's ATHANOR_API_KEY (several with commas) is seen by fewer people."""
    max_batch: int = 64
    """Answers that are computed together at most."""
    max_queue: int = 256
    """Unfinished answers, waiting ones included, beyond which clients are told to come back later (429)."""
    max_tokens: int | None = None
    """Length of a chat's answer where the client sets no limit, in tokens; by default what the context has left."""
    timeout: float | None = None
    """Seconds that an answer may take, waiting included, before it is given up (504)."""
    grace: float = process.GRACE
    """Seconds that unfinished answers still have once the server is told to stop (SIGTERM)."""
    access_log: Path | None = None
    """File to which every request is written as a line of JSON, without its texts."""
    precision: Precision = "fp32"
    """Of the matrix products: bf16 is faster, and on CPUs takes 2 bytes a weight more."""
    compile: bool = False
    """Compile the step that decodes: about a minute at the start, and answers 1.2 to 1.5 times as fast on CPUs."""
    deterministic: bool = False
    """The same answer to the last bit, whatever else is answered or in the cache: two to four times slower."""
    guess: int | Literal["heads"] = 0
    """Tokens guessed to follow as they did earlier in a text, or `heads`: by the model's own. Changes speed, not answers."""


def main(config: Config) -> None:
    for field in ("max_batch", "max_queue", "max_tokens"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ConfigError(f"{field} is {value}, but must be at least 1: raise it")
    if config.timeout is not None and not config.timeout > 0:
        raise ConfigError(f"timeout is {config.timeout:g}, but must be more than 0 seconds: raise it, or leave it out")
    if not 0 <= config.grace <= 86_400:
        raise ConfigError(f"grace is {config.grace:g}, but must lie between 0 and 86400 seconds, a day: 20 is usual")
    guessers = [speculative.by(config.guess) for _ in config.paths]  # one for each engine
    options = Options(config.max_queue, config.max_tokens, config.timeout, _keys(config), page.PUBLIC)
    with _listen(config.host, config.port) as listener, guard.access_to(config.access_log):
        lms = [athanor.load(path, config.checkpoint) for path in config.paths]
        how = {name: getattr(config, name) for name in ("max_batch", "precision", "compile", "deterministic")}
        app = create_server([Served.of(lm, guesser=g, **how) for lm, g in zip(lms, guessers, strict=True)], options)
        page.install(app, page.run_of(lms[0].path))
        url = _url(listener)
        print(f"Serving {', '.join(repr(lm.name) for lm in lms)} at {url}/v1 (Ctrl-C stops), a page at {url}/. Try:\n")
        print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\")
        if options.api_keys:
            print(f'    -H "Authorization: Bearer ${KEY}" \\')
        print(f'    -d \'{{"model": "{lms[0].name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n', flush=True)
        server = process.Server(process.settings(app, config.grace), config.grace)
        # uvicorn raises the signal that stopped it once more at its end; being told to stop is no failure.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    print("Stopped.", file=sys.stderr)


def _keys(config: Config) -> tuple[str, ...]:
    """The keys of the options and of the environment. Raises ConfigError for one that no header can hold."""
    given = os.environ.get(KEY)
    keys = config.api_key + (() if given is None else tuple(given.split(",")))
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            where = "api_key" if key in config.api_key else KEY
            raise ConfigError(f"a key of {where} is empty or has blanks, or others than ASCII's: choose another, or unset it")
    return keys


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
        raise ConfigError(f"cannot listen at host {host!r}, port {port}: {error}; choose others with --host & --port") from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
