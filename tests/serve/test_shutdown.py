"""`athanor serve` in a process of its own, told to stop or killed while many clients wait for their answers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from athanor.lm import LM
from athanor.recipes import serve
from athanor.serve import process
from athanor.serve.app import create_app
from tests.processes import alive, environment, until

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")

MODEL = "tiny/base"
CLIENTS, BATCH = 24, 4
CONTEXT = 1 << 15
TOKENS, LONG, ENDLESS = 24, 400, CONTEXT - 100  # of an answer; the last takes longer than all clients take to come

# The command with another LAST, its first argument.
HURRIED = """
import sys
from athanor import cli
from athanor.serve import process
process.LAST = float(sys.argv.pop(1))
raise SystemExit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, tiny):
    """A run folder whose answers may be as long as nobody waits for."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    LM(tiny(max_positions=CONTEXT), tokenizer).save(folder / "base")
    return folder


@dataclass
class Serving:
    """A server process; `said` is what it wrote to stderr."""

    process: subprocess.Popen[str]
    client: httpx.Client
    env: dict[str, str]
    errors: Any

    @property
    def port(self) -> int:
        assert self.client.base_url.port is not None
        return self.client.base_url.port

    @property
    def said(self) -> str:
        self.errors.seek(0)
        # Of a client that leaves while it is written to asyncio says so, where the machine is too busy to notice at once.
        return self.errors.read().replace("socket.send() raised exception.\n", "")

    def tell(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def load(self) -> int:
        """Answers that run or wait."""
        load: int = self.client.get("/load").json()["server_load"]
        return load

    def ended(self) -> int:
        """The exit status, once nothing of the server is left."""
        status = self.process.wait(120)
        assert not alive(self.env), "a process is left behind"
        return status


@contextlib.contextmanager
def serving(run: Path, *options: object, grace: float | None = None, last: float = 60) -> Iterator[Serving]:
    """A server that can be asked."""
    program = ["-m", "athanor"] if grace is None else ["-c", HURRIED, str(last)]
    options = options if grace is None else ("--grace", grace, *options)
    env = environment()
    command = [sys.executable, *program, "serve", str(run), *map(str, options)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r" at (http://127\.0\.0\.1:\d+)/v1 ", process.stdout.readline())
            with client_of(found[1] if found else "") as client:
                server = Serving(process, client, env, errors)
                assert found, server.said
                assert client.get("/health").status_code == 200
                yield server
        finally:
            for pid in alive(env):
                os.kill(pid, signal.SIGKILL)
            process.communicate()


def client_of(url: str | httpx.URL) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, trust_env=False, verify=False)  # no certificates, which take long to read


# Clients.


@dataclass
class Heard:
    """What a client got: status, texts of the answer by kind, why it ended, whether its stream was closed, the error."""

    status: int
    text: str
    reasoning: str
    finish_reason: str | None
    done: bool
    error: dict[str, Any] | None


def ask(client: httpx.Client, i: int, tokens: int = TOKENS, begun: threading.Event | None = None) -> Heard:
    """Request number `i`, greedy: of a chat or a text, streamed or whole, in turn; `begun` is set once anything is there."""
    chat, stream = i % 2 == 0, i % 4 < 2
    asked = {"messages": [{"role": "user", "content": f"Number {i}"}]} if chat else {"prompt": f"Number {i}"}
    limits = {"temperature": 0, "min_tokens": tokens, "max_tokens": tokens, "stream": stream}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    lines = []
    with client.stream("POST", path, json={"model": MODEL, **asked, **limits}) as response:
        for line in response.iter_lines():
            lines += [line] if line else []
            if begun is not None:
                begun.set()
    done = lines[-1] == "data: [DONE]"
    bodies = [json.loads(line.removeprefix("data: ")) for line in lines[: len(lines) - done]]
    heard = Heard(response.status_code, "", "", None, done or not stream, None)
    for body in bodies:
        heard.error = body.get("error", heard.error)
        for choice in body.get("choices", ()):
            part = choice.get("message") or choice.get("delta") or choice
            heard.text += part.get("content") or part.get("text") or ""
            heard.reasoning += part.get("reasoning") or ""
            heard.finish_reason = choice["finish_reason"] or heard.finish_reason
    return heard


def knock(client: httpx.Client) -> bool:
    """Whether a request that waits for nobody is answered. One that is refused hears so before an answer begins."""
    began, broken = False, None
    try:
        with client.stream("POST", "/tokenize", json={"model": MODEL, "prompt": "a"}) as response:
            began = True
            body = json.loads(response.read())
    except httpx.TransportError as error:
        broken = error
    if broken is not None:
        assert not isinstance(broken, httpx.TimeoutException), "a hang"
        assert not began, "half an answer"
        return False
    assert (response.status_code, body["count"]) == (200, 2)
    return True


class Crowd:
    """CLIENTS requests, all of them with the server: one that is answered at length, and others that wait or come after it.

    What else there is room for in a batch is taken by a client that leaves at `release`: until then answers end one by one.
    Each client comes back on its connection, which must be shut to it once `closed` is set.
    """

    def __init__(self, server: Serving, pool: ThreadPoolExecutor, tokens: int = TOKENS, long: int = LONG) -> None:
        self._server, self.closed, begun = server, threading.Event(), threading.Event()
        self._held, self._plug = contextlib.ExitStack(), BATCH - 1
        limits = {"n": self._plug, "max_tokens": ENDLESS, "min_tokens": ENDLESS, "stream": True, "seed": 1}
        client = self._held.enter_context(client_of(server.client.base_url))
        plug = client.stream("POST", "/v1/completions", json={"model": MODEL, "prompt": "x", **limits})
        self._lines = self._held.enter_context(plug).iter_lines()  # kept: httpx closes a connection that nobody reads
        next(self._lines)
        self.answers = [pool.submit(self._one, 0, long, begun)]
        assert begun.wait(60)
        self.answers += [pool.submit(self._one, i, tokens) for i in range(1, CLIENTS)]
        until(lambda: self.ready + server.load() == CLIENTS + self._plug, "all requests are with the server")

    def _one(self, i: int, tokens: int, begun: threading.Event | None = None) -> Heard:
        with client_of(self._server.client.base_url) as client:
            heard = ask(client, i, tokens, begun)
            late = self.closed.is_set()
            assert not (knock(client) and late), "a connection that was open goes on"
            return heard

    @property
    def ready(self) -> int:
        return sum(answer.done() for answer in self.answers)

    def release(self) -> None:
        self._held.close()

    def heard(self) -> list[Heard]:
        return [answer.result(120) for answer in self.answers]


class Slow:
    """A client that sends the headers of a request, or a part of them, and its body when it is told to."""

    BODY = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 3, "min_tokens": 3}).encode()

    def __init__(self, port: int, whole: bool) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 60)
        lines = [
            "POST /v1/completions HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            f"Content-Length: {len(self.BODY)}",
        ]
        self._socket.sendall("\r\n".join([*lines, "\r\n"] if whole else lines).encode())

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def end(self) -> bytes:
        """Send the body; all that came back."""
        with self._socket.makefile("rb") as file, contextlib.suppress(ConnectionError):
            self._socket.sendall(self.BODY)
            return file.read()
        return b""


# Told to stop.


def _no_accepted_request_is_lost(run: Path, number: int, done: int) -> None:
    """`done` answers are through when the signal comes."""
    with serving(run, "--port", 0, "--max-batch", BATCH) as server, ThreadPoolExecutor(CLIENTS) as pool:
        quiet = Crowd(server, pool)
        quiet.release()
        expected = quiet.heard()
        assert all(heard.status == 200 and heard.done and heard.finish_reason == "length" for heard in expected)
        assert len({heard.text + heard.reasoning for heard in expected}) > CLIENTS // 2

        idle = server.client
        with Slow(server.port, False) as headless, Slow(server.port, True) as bodiless:
            crowd = Crowd(server, pool)
            if done:
                crowd.release()
                until(lambda: crowd.ready >= done, "some answers are through")
            assert knock(idle)
            server.tell(number)
            with client_of(idle.base_url) as late:
                until(lambda: not knock(late), "new connections are refused")
                crowd.closed.set()
                assert crowd.ready < CLIENTS, "nothing is in flight any more"
                assert not any(knock(late) for _ in range(5))
            assert not knock(idle)
            crowd.release()
            assert headless.end() == b""
            head, _, body = bodiless.end().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and json.loads(body)["usage"]["completion_tokens"] == 3

        assert crowd.heard() == expected
        assert server.ended() == 0
        assert server.said == "Stopped.\n"
        serve._listen("127.0.0.1", server.port).close()


def test_sigterm_under_load_loses_no_accepted_request(run):
    _no_accepted_request_is_lost(run, signal.SIGTERM, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("done", [1, 7])
def test_signals_at_other_moments_lose_none_either(run, number, done):
    _no_accepted_request_is_lost(run, number, done)


def test_answers_with_minutes_to_go_end_with_an_error_when_the_grace_is_over(run):
    """Those that run and those that wait, streamed and whole."""
    with serving(run, "--port", 0, "--max-batch", BATCH, grace=0.5) as server, ThreadPoolExecutor(CLIENTS) as pool:
        crowd = Crowd(server, pool, ENDLESS, ENDLESS)
        crowd.closed.set()
        server.tell(signal.SIGTERM)
        crowd.release()
        heard = crowd.heard()
        assert server.ended() == 0
    assert {(h.status, h.done, h.finish_reason) for h in heard} == {(200, False, None), (503, True, None)}
    assert {h.error and h.error["code"] for h in heard} == {"shutting_down"}


# Told twice.


def _told_twice(run: Path, first: int, second: int) -> None:
    """Nothing but the second signal ends the answers: the grace is 1000 s."""
    with serving(run, "--port", 0, "--max-batch", BATCH, grace=1000) as server, ThreadPoolExecutor(CLIENTS) as pool:
        crowd = Crowd(server, pool, ENDLESS, ENDLESS)
        server.tell(first)
        until(lambda: not knock(server.client), "new requests are refused")
        crowd.closed.set()
        assert crowd.ready == 0
        server.tell(second)
        heard = crowd.heard()
        assert server.ended() == 0
        assert server.said == "Stopped.\n"
        crowd.release()
    assert {(h.status, h.done, h.finish_reason) for h in heard} == {(200, False, None), (503, True, None)}
    assert {h.error and h.error["code"] for h in heard} == {"shutting_down"}


def test_a_second_signal_ends_what_is_unfinished_with_an_error(run):
    _told_twice(run, signal.SIGTERM, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_whichever_signals_they_are(run, first, second):
    _told_twice(run, first, second)


@pytest.mark.slow
def test_a_client_that_does_not_read_and_one_that_does_not_send_hold_nobody_up(run):
    with (
        serving(run, "--port", 0, "--max-batch", 8, grace=0, last=0.1) as server,
        Slow(server.port, True) as bodiless,
        socket.socket() as deaf,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        asked = {"model": MODEL, "prompt": "a", "n": 8, "max_tokens": 300, "min_tokens": 300, "logprobs": 20, "stream": True}
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        deaf.sendall(head.encode() + body)
        until(lambda: "athanor:request_success_total" in server.client.get("/metrics").text, "something is there")
        until(lambda: server.load() == 0, "the answer is computed")
        server.tell(signal.SIGTERM)
        assert server.ended() == 0
        assert bodiless.end() == b""
        assert server.said == "Stopped.\n"


# Killed.


def _killed_under_load(run: Path) -> int:
    """The port of a server that was killed while it answered."""
    with serving(run, "--port", 0, "--max-batch", BATCH) as server, ThreadPoolExecutor(CLIENTS) as pool:
        crowd = Crowd(server, pool, ENDLESS, ENDLESS)
        server.tell(signal.SIGKILL)
        for answer in crowd.answers:  # none hangs
            error = answer.exception(120)
            assert isinstance(error, httpx.TransportError) and not isinstance(error, httpx.TimeoutException)
        crowd.release()
        assert server.ended() == -signal.SIGKILL
        return server.port


def test_a_killed_server_leaves_no_process_and_its_port_free(run, fake, tokenizer):
    port = _killed_under_load(run)
    with serve._listen("127.0.0.1", port) as listener:
        server = uvicorn.Server(process.settings(create_app(fake(), tokenizer, MODEL)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.slow
def test_after_a_kill_the_next_server_answers_at_the_same_port(run):
    port = _killed_under_load(run)
    for _ in range(2):
        with serving(run, "--port", port) as server:
            assert server.port == port
            assert ask(server.client, 0).finish_reason == "length"
            server.tell(signal.SIGKILL)
            assert server.ended() == -signal.SIGKILL
