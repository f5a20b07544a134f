"""A tiny model, a fake engine with the interface of athanor.infer.engine.Engine, a tokenizer, and a running server."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from athanor.core.errors import RequestError
from athanor.lm import LM
from athanor.models import llama
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Completion, Request

TEXT = "The quick brown fox jumps over the lazy dog and says 12 + 30 = 42. "


@dataclass
class FakeChunk:
    request_id: str
    content: str
    reasoning: str
    completion: Completion | None


class FakeEngine:
    """Says `script(request)`, one character a step, all requests in parallel; checks that one thread alone drives it."""

    def __init__(self, script: Callable[[Request], str] = lambda request: "hello", max_len: int = 1000) -> None:
        self.script = script
        self.max_len = max_len
        self.live: dict[str, tuple[Request, str, int]] = {}
        self.seen: list[Request] = []
        self.aborted: list[str] = []
        self.fail: list[Exception] = []  # raised by the next steps, one each
        self.fail_add: list[Exception] = []
        self.gate = threading.Event()  # steps wait for it
        self.gate.set()
        self._thread: int | None = None

    def _own(self) -> None:
        me = threading.get_ident()
        assert self._thread in (None, me), "two threads use the engine"
        self._thread = me

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def add(self, request: Request) -> None:
        self._own()
        if self.fail_add:
            raise self.fail_add.pop(0)
        if len(request.prompt_ids) >= self.max_len:
            raise RequestError("too long", "messages")
        self.seen.append(request)
        self.live[request.id] = (request, self.script(request), 0)

    def abort(self, request_id: str) -> None:
        self._own()
        del self.live[request_id]
        self.aborted.append(request_id)

    def step(self) -> list[FakeChunk]:
        self._own()
        assert self.gate.wait(60)
        if self.fail:
            raise self.fail.pop(0)
        chunks = []
        for key, (request, text, at) in list(self.live.items()):
            end = min(at + 1, len(text), request.params.max_tokens)
            completion = None
            if end == len(text) or end == request.params.max_tokens:
                reason = "stop" if end == len(text) else "length"
                ids = list(range(end))
                completion = Completion(key, request.prompt_ids, ids, [0.0] * end, text[:end], None, reason)
                del self.live[key]
            else:
                self.live[key] = (request, text, end)
            chunks.append(FakeChunk(key, text[at:end], "", completion))
        return chunks


@pytest.fixture(scope="session")
def fake() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 3], 300)


@dataclass
class Running:
    url: str
    app: FastAPI
    server: uvicorn.Server

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, "timeout": 60, **options})  # type: ignore[arg-type]


@contextlib.contextmanager
def _running(app: FastAPI, server_class: type[uvicorn.Server] = uvicorn.Server) -> Iterator[Running]:
    # Named as TCP, or asyncio would not turn Nagle's algorithm off and every answer would take 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(100)
        server = server_class(uvicorn.Config(app, log_level="critical", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            # The socket listens already, so a client may connect before the server has started.
            yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", app, server)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def running() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    return _running


@pytest.fixture(scope="session")
def lm(tokenizer: Tokenizer) -> LM:
    """A tiny model with random weights: it speaks in broken bytes and stray control tokens."""
    torch.manual_seed(0)
    config = llama.Config(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=64, max_positions=128, tied=False
    )
    return LM(llama.Model(config).eval(), tokenizer)
