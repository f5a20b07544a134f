"""`athanor serve`: what it prints, how it starts, how it ends."""

from __future__ import annotations

import gc
import json
import os
import queue
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.routing import Route

import athanor
from athanor import cli
from athanor.core.errors import ConfigError
from athanor.infer.speculative import Heads
from athanor.lm import LM
from athanor.models import bert
from athanor.recipes import serve
from athanor.serve import guard, page, process
from athanor.serve.app import Options, create_app
from athanor.serve.models import Served

HELLO = [{"role": "user", "content": "hello"}]


def model(tokenizer, name, seen):
    kind = SimpleNamespace(kind="decoder", task="lm", token_ids=SimpleNamespace(start=()))
    return SimpleNamespace(name=name, tokenizer=tokenizer, path=None, model=kind, engine=lambda **options: seen.update(options))


def test_options_reach_what_they_are_for(tokenizer, monkeypatch, capsys, tmp_path):
    seen = {"loaded": []}

    def load(path, checkpoint):
        seen["loaded"].append((path, checkpoint))
        return model(tokenizer, f"{path.name}/rl", seen)

    app = FastAPI()
    monkeypatch.delenv("ATHANOR_API_KEY", raising=False)
    monkeypatch.setattr(athanor, "load", load)
    monkeypatch.setattr(serve, "create_server", lambda served, options: seen.update(served=served, options=options) or app)
    monkeypatch.setattr(
        process.Server, "run", lambda self, sockets: seen.update(address=sockets[0].getsockname(), grace=self.grace)
    )
    before = signal.getsignal(signal.SIGINT)
    paths = (Path("runs/first"), Path("runs/second"))
    serve.main(serve.Config(paths, "rl", "localhost", 0, ("key",), 3, 4, 5, 6.0, 9.0, None, "bf16", True, True, 7))
    assert seen["loaded"] == [(paths[0], "rl"), (paths[1], "rl")]
    assert (seen["max_batch"], seen["precision"], seen["guesser"].count) == (3, "bf16", 7)
    assert seen["compile"] and seen["deterministic"] and seen["grace"] == 9.0
    assert seen["options"] == Options(4, 5, 6.0, ("key",), page.PUBLIC)
    assert [served.name for served in seen["served"]] == ["first/rl", "second/rl"]
    assert "/" in {route.path for route in app.routes if isinstance(route, Route)}  # the page
    host, port = seen["address"][:2]
    assert host in ("127.0.0.1", "::1")
    out = capsys.readouterr().out
    assert re.search(rf"Serving 'first/rl', 'second/rl' at http://\S+:{port}/v1", out)
    assert '-H "Authorization: Bearer $ATHANOR_API_KEY"' in out
    assert signal.getsignal(signal.SIGINT) is before


def test_every_model_guesses_with_its_own_heads(tokenizer, monkeypatch):
    seen = {}
    monkeypatch.setattr(athanor, "load", lambda path, checkpoint: model(tokenizer, path.name, seen.setdefault(path.name, {})))
    monkeypatch.setattr(serve, "create_server", lambda served, options: FastAPI())
    monkeypatch.setattr(process.Server, "run", lambda self, sockets: None)
    serve.main(serve.Config((Path("a"), Path("b")), port=0, guess="heads"))
    a, b = (seen[name]["guesser"] for name in "ab")
    assert isinstance(a, Heads) and isinstance(b, Heads) and a is not b
    with pytest.raises(ConfigError, match=r"guess is -1, but must be 0 \(nothing is guessed\), a number of tokens, or heads"):
        serve.main(serve.Config((Path("a"),), guess=-1))


def test_guesses_are_a_number_or_heads(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(serve, "main", seen.append)
    monkeypatch.setattr(cli, "_load", lambda name: serve)
    assert cli.main(["serve", "runs/a", "--guess", "heads"]) == cli.main(["serve", "runs/a", "--guess", "5"]) == 0
    assert [config.guess for config in seen] == ["heads", 5]
    assert cli.main(["serve", "runs/a", "--guess", "tails"]) == 2
    assert "--guess" in capsys.readouterr().err


def test_the_command_takes_several_folders(monkeypatch):
    seen = []
    monkeypatch.setattr(serve, "main", seen.append)
    monkeypatch.setattr(cli, "_load", lambda name: serve)
    assert cli.main(["serve", "runs/a", "runs/b", "--port", "1", "--api-key", "x", "--api-key", "y"]) == 0
    (config,) = seen
    assert (config.paths, config.port, config.api_key) == ((Path("runs/a"), Path("runs/b")), 1, ("x", "y"))
    assert cli.main(["serve"]) == 2


def test_keys_of_the_environment(monkeypatch):
    config = serve.Config((Path("runs/first"),), api_key=("a",))
    monkeypatch.delenv("ATHANOR_API_KEY", raising=False)
    assert serve._keys(config) == ("a",)
    monkeypatch.setenv("ATHANOR_API_KEY", "b,c")
    assert serve._keys(config) == ("a", "b", "c")
    for wrong in ("", "b,,c", "a b", "ü", "\t"):
        monkeypatch.setenv("ATHANOR_API_KEY", wrong)
        with pytest.raises(ConfigError, match="a key of ATHANOR_API_KEY is empty or has blanks, or others than ASCII"):
            serve.main(config)
    monkeypatch.delenv("ATHANOR_API_KEY")
    with pytest.raises(ConfigError, match="a key of api_key is empty"):
        serve.main(serve.Config((Path("runs/first"),), api_key=("",)))


def test_the_access_log_is_a_file(fake, tokenizer, running, tmp_path):
    path = tmp_path / "access.jsonl"
    with guard.access_to(path), running(create_app(fake(), tokenizer, "first")) as served:
        httpx.get(f"{served.url}/health")
    with running(create_app(fake(), tokenizer, "first")) as served:
        httpx.get(f"{served.url}/version")
    (line,) = map(json.loads, path.read_text("utf-8").splitlines())
    assert (line["path"], line["status"]) == ("/health", 200)
    with pytest.raises(ConfigError, match=r"cannot write access_log .*gone.*: No such file or directory; choose another file"):
        serve.main(serve.Config((Path("runs/first"),), port=0, access_log=tmp_path / "gone" / "log"))


def test_a_model_that_gives_vectors_alone_is_served(tokenizer):
    config = bert.Config(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=1, n_heads=2, d_ff=32, max_positions=64)
    served = Served.of(LM(bert.Model(config).eval(), tokenizer))
    assert (served.engine, served.context, served.vocab_size) == (None, 64, tokenizer.vocab_size)


def test_by_default_only_this_machine_can_connect():
    assert serve.Config((Path(),)).host == "127.0.0.1"


def test_an_address_that_cannot_be_had():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen at host '127.0.0.1', port {port}: .*choose others with --host"):
            serve.main(serve.Config((Path("runs/first"),), port=port))
    for port in (-1, 65536, 10**30):
        with pytest.raises(ConfigError, match=f"port is {port}, but must be 0 to 65535"):
            serve.main(serve.Config((Path("runs/first"),), port=port))
    with pytest.raises(ConfigError, match=r"host 'no such host', port 8000: .*check --host and --port"):
        serve.main(serve.Config((Path("runs/first"),), host="no such host"))


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_timeout_that_is_none(seconds):
    with pytest.raises(ConfigError, match=r"timeout is .*, but must be more than 0 seconds"):
        serve.main(serve.Config((Path("runs/first"),), timeout=seconds))


@pytest.mark.parametrize("field", ["max_batch", "max_queue", "max_tokens"])
def test_numbers_below_one(field):
    with pytest.raises(ConfigError, match=f"{field} is 0, but must be at least 1"):
        serve.main(serve.Config((Path("runs/first"),), **{field: 0}))


def test_ipv6_addresses_are_shown_as_urls_want_them():
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as s:
        try:
            s.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        assert serve._url(s) == f"http://[::1]:{s.getsockname()[1]}"


def test_what_is_unfinished_when_the_time_is_up_ends_with_an_error(fake, tokenizer, running):
    engine = fake(lambda r: "x" * 10**7, max_len=10**8)
    app = create_app(engine, tokenizer, "first")
    with running(app, partial(process.Server, grace=0.1)) as served, served.client() as client:
        chunks = iter(client.chat.completions.create(model="first", messages=HELLO, stream=True))
        next(chunks)
        served.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
    assert not engine.has_work


def test_headers_that_do_not_end(fake, tokenizer):
    """uvicorn's own answer: the application never sees such a request."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(process.settings(create_app(fake(), tokenizer, "first")))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = listener.getsockname()
        with socket.create_connection(address) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (2 * guard.MAX_HEADERS))
            assert sock.recv(1000).startswith(b"HTTP/1.1 400")
        response = httpx.get(f"http://127.0.0.1:{address[1]}/health")
        assert (response.status_code, "server" in response.headers) == (200, False)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "n": 3}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/responses", {"input": "a"}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_is_told_to_stop_finishes_what_it_has_and_takes_nothing_new(fake, tokenizer, running, path, body, stream):
    engine = fake()
    engine.gate.clear()
    with running(create_app(engine, tokenizer, "first"), process.Server) as served, ThreadPoolExecutor(1) as pool:
        asked = {"model": "first", "stream": stream, **body}
        held = pool.submit(httpx.post, served.url + path, json=asked, timeout=60)
        while not httpx.get(f"{served.url}/load").json()["server_load"]:
            pass
        served.server.should_exit = True
        with pytest.raises(httpx.TransportError):
            while True:
                httpx.get(f"{served.url}/health")
        engine.gate.set()
        answer = held.result(60)
    assert answer.status_code == 200
    if path == "/v1/responses":
        assert '"status": "completed"' in answer.text.replace('":"', '": "')
    else:
        assert answer.text.replace('":"', '": "').count('"finish_reason": "stop"') == len(engine.seen)
    assert ("[DONE]" in answer.text) == (stream and path != "/v1/responses")


def test_what_stays_is_not_looked_through_for_garbage_while_it_serves(fake, tokenizer, running):
    before = gc.get_freeze_count()
    with running(create_app(fake(), tokenizer, "first"), process.Server) as served:
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert gc.get_freeze_count() > before + 10_000
    assert gc.get_freeze_count() <= before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_server_after_the_answers_in_flight(lm, tmp_path, monkeypatch, number):
    lm.save(tmp_path / "first" / "base")
    address = queue.Queue()
    monkeypatch.setattr(serve, "print", lambda *text, **options: address.put(" ".join(text)), raising=False)

    def use():
        try:
            url = re.search(r"Serving 'first/base' at (http://127\.0\.0\.1:\d+)/v1", address.get(timeout=60))[1]
            address.get(timeout=60)
            body = re.search("-d '(.*)'", address.get(timeout=60))[1]  # the curl example is a request that works
            headers = {"content-type": "application/json"}
            whole = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=60)
            request = {"model": "first/base", "messages": HELLO, "stream": True, "n": 8, "seed": 1}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=60) as response:
                events = (line for line in response.iter_lines() if line)
                first = next(events)
                os.kill(os.getpid(), number)
                return whole.status_code, first, list(events)[-1]
        except BaseException:
            os.kill(os.getpid(), number)
            raise

    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(use)
        before = signal.getsignal(number)
        assert serve.main(serve.Config((tmp_path / "first",), port=0)) is None
        status, first, last = used.result(60)
    assert (status, last) == (200, "data: [DONE]")
    assert '"role": "assistant"' in first
    assert signal.getsignal(number) is before
