"""A tiny model, a fake engine with the interface of athanor.infer.engine.Engine, a tokenizer, and a running server."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from athanor.core.errors import RequestError
from athanor.infer.engine import Chunk, Stats
from athanor.lm import LM
from athanor.models import llama
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Completion, Request, SamplingParams, Timing, TokenLogprob
from tests.conftest import tiny_of

TEXT = "The quick brown fox jumps over the lazy dog and says 12 + 30 = 42. "


class FakeEngine:
    """Says `script(request)`, one character a step, all requests in parallel; checks that one thread alone drives it.

    Token i of an answer has the id i and the log-probability -i.
    """

    vocab_size = 300

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
        self.stepping = threading.Event()  # a step was begun
        self.counts = Stats()
        self.cached = 0
        self._thread: int | None = None

    def _own(self) -> None:
        me = threading.get_ident()
        assert self._thread in (None, me), "two threads use the engine"
        self._thread = me

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def stats(self) -> Stats:
        self._own()
        return replace(self.counts, running=len(self.live))

    def add(self, request: Request) -> None:
        self._own()
        if self.fail_add:
            raise self.fail_add.pop(0)
        if len(request.prompt_ids) >= self.max_len:
            raise RequestError("too long", "messages")
        self.seen.append(request)
        self.live[request.id] = (request, self.script(request), 0)
        self.counts.prompt_tokens += len(request.prompt_ids)

    def prepare(self, params: SamplingParams) -> None:
        self.prepared = params

    def abort(self, request_id: str) -> None:
        self._own()
        del self.live[request_id]
        self.aborted.append(request_id)

    def step(self) -> list[Chunk]:
        self._own()
        self.stepping.set()
        assert self.gate.wait(60)
        if self.fail:
            raise self.fail.pop(0)
        self.counts.step_tokens = len(self.live)
        self.counts.generation_tokens += len(self.live)
        chunks = []
        for key, (request, text, at) in list(self.live.items()):
            end = min(at + 1, len(text), request.params.max_tokens)
            completion = None
            if end == len(text) or end == request.params.max_tokens:
                completion = self._completion(request, text, end)
                del self.live[key]
            else:
                self.live[key] = (request, text, end)
            top = request.params.logprobs
            told = () if top is None else tuple(self._told(i, top) for i in range(at, end))
            chunks.append(Chunk(key, text[at:end], "", completion, tuple(range(at, end)), told))
        return chunks

    def _told(self, id: int, top: int) -> TokenLogprob:
        return TokenLogprob(id, -float(id), tuple((i, -float(i)) for i in range(top)))

    def _completion(self, request: Request, text: str, end: int) -> Completion:
        ids, p = list(range(end)), request.params
        top = None if p.logprobs is None else [self._told(i, p.logprobs) for i in ids]
        of_prompt = None
        if p.prompt_logprobs is not None:
            of_prompt = [None, *(self._told(i, p.prompt_logprobs) for i in request.prompt_ids[1:])]
        return Completion(
            *(request.id, request.prompt_ids, ids, [-float(i) for i in ids], text[:end], None),
            *("stop" if end == len(text) else "length", None, top, of_prompt, self.cached, Timing(1.0, 1.5, 2.5, 4.5)),
        )


@pytest.fixture(scope="session")
def fake() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 3], 300)


@pytest.fixture(scope="session")
def tiny(tokenizer: Tokenizer) -> Callable[..., llama.Model]:
    """The one of all rooms, for this room's tokenizer."""
    return tiny_of(tokenizer.vocab_size)


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
