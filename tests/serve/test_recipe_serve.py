"""`athanor serve`: what it prints, how it starts, how it ends."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

import athanor
from athanor.core.errors import ConfigError
from athanor.recipes import serve
from athanor.serve.app import create_app

HELLO = [{"role": "user", "content": "hello"}]


def test_options_reach_what_they_are_for(fake, tokenizer, monkeypatch, capsys):
    seen = {}

    def load(path, checkpoint):
        seen.update(path=path, checkpoint=checkpoint)
        return SimpleNamespace(name="first/rl", tokenizer=tokenizer, engine=lambda max_batch: seen.update(max_batch=max_batch))

    monkeypatch.setattr(athanor, "load", load)
    monkeypatch.setattr(serve, "create_app", lambda *args, **options: seen.update(args=args, **options))
    monkeypatch.setattr(serve._Server, "run", lambda self, sockets: seen.update(address=sockets[0].getsockname()))
    before = signal.getsignal(signal.SIGINT)
    serve.main(serve.Config(Path("runs/first"), "rl", "localhost", 0, 3, 4, 5))
    assert (seen["path"], seen["checkpoint"]) == (Path("runs/first"), "rl")
    assert (seen["max_batch"], seen["max_queue"], seen["default_max_tokens"]) == (3, 4, 5)
    assert seen["args"] == (None, tokenizer, "first/rl")
    host, port = seen["address"][:2]
    assert host in ("127.0.0.1", "::1")
    assert re.search(rf"Serving 'first/rl' at http://\S+:{port}/v1", capsys.readouterr().out)
    assert signal.getsignal(signal.SIGINT) is before


def test_by_default_only_this_machine_can_connect():
    assert serve.Config(Path()).host == "127.0.0.1"


def test_an_address_that_cannot_be_had():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen at host '127.0.0.1', port {port}: .*choose others with --host"):
            serve.main(serve.Config(Path("runs/first"), port=port))
    for port in (-1, 65536, 10**30):
        with pytest.raises(ConfigError, match=f"port is {port}, but must be 0 to 65535"):
            serve.main(serve.Config(Path("runs/first"), port=port))
    with pytest.raises(ConfigError, match=r"host 'no such host', port 8000: .*check --host and --port"):
        serve.main(serve.Config(Path("runs/first"), host="no such host"))


@pytest.mark.parametrize("field", ["max_batch", "max_queue", "max_tokens"])
def test_numbers_below_one(field):
    with pytest.raises(ConfigError, match=f"{field} is 0, but must be at least 1"):
        serve.main(serve.Config(Path("runs/first"), **{field: 0}))


def test_ipv6_addresses_are_shown_as_urls_want_them():
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as s:
        try:
            s.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        assert serve._url(s) == f"http://[::1]:{s.getsockname()[1]}"


def test_what_is_unfinished_when_the_time_is_up_ends_with_an_error(fake, tokenizer, running, monkeypatch):
    monkeypatch.setattr(serve, "GRACE", 0.1)
    engine = fake(lambda r: "x" * 10**7, max_len=10**8)
    app = create_app(engine, tokenizer, "first")
    with running(app, serve._Server) as served, served.client() as client:
        chunks = iter(client.chat.completions.create(model="first", messages=HELLO, stream=True))
        next(chunks)
        served.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
    assert not engine.has_work


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
        assert serve.main(serve.Config(tmp_path / "first", port=0)) is None
        status, first, last = used.result(60)
    assert (status, last) == (200, "data: [DONE]")
    assert '"role": "assistant"' in first
    assert signal.getsignal(number) is before
