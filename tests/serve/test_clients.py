"""The clients of a load test, against a scripted server and our own."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from athanor.core.errors import ConfigError, MissingExtraError
from athanor.serve.app import create_app
from athanor.serve.clients import LoadError, base_of, measure
from athanor.serve.load import Load, Mix, plan
from tests.serve.talker import Talker

LOAD, MIX = Load(rate=None, requests=12, clients=3), Mix(prompt=(30, 60), output=(5, 20))


def go(url, load=LOAD, mix=MIX, **options):
    return asyncio.run(measure(url, load, mix, **options))


@pytest.fixture
def talker():
    return Talker()


def test_every_request_is_sent_as_planned_and_answered(talker, running):
    seen = []
    with running(talker.app) as served:
        found = go(served.url, progress=seen.append)
    asked = [body for body in talker.asked if body.get("stream")]
    assert found.model == "first/rl"
    assert len(asked) == len(found.outcomes) == 12
    assert len(talker.asked) == 14  # and the two that measure tokens a word
    by_seed = {body["seed"]: body for body in asked}
    for ask in plan(LOAD, MIX):
        body = by_seed[ask.seed]
        assert body["max_tokens"] == ask.output
        assert abs(talker.tokens(body) - ask.prompt) <= 2  # half a word of three tokens
        assert body["temperature"] == 1.0
        assert "ignore_eos" not in body
    assert len({body["messages"][0]["content"] for body in asked}) == 12  # nothing that a prefix cache would know
    for outcome in found.outcomes:
        assert outcome.complete and outcome.finish == "length"
        assert outcome.planned <= outcome.sent <= outcome.first <= outcome.last <= outcome.ended
    assert sorted(o.tokens for o in found.outcomes) == sorted(body["max_tokens"] for body in asked)
    assert sorted(o.prompt_tokens for o in found.outcomes) == sorted(talker.tokens(body) for body in asked)
    # As many as there are clients; how many of them the server is still writing to at once is up to the machine.
    assert 1 <= talker.most <= found.summary()["most_in_flight"] == 3
    assert [record["step"] for record in seen] == list(range(1, 13))
    assert seen[-1] == {"step": 12, "in flight": 0}


def test_requests_of_a_rate_come_when_they_are_due(talker, running):
    load = Load(rate=50.0, requests=10, clients=64)
    with running(talker.app) as served:
        found = go(served.url, load)
    assert [o.planned for o in found.outcomes] == [ask.at for ask in plan(load, MIX)]
    assert all(o.sent >= o.planned for o in found.outcomes)


def test_options_of_the_mix_reach_the_server(talker, running):
    with running(talker.app) as served:
        go(served.url, replace(LOAD, requests=1), replace(MIX, ignore_eos=True, temperature=0.25), model="first/sft")
    assert (talker.asked[-1]["ignore_eos"], talker.asked[-1]["temperature"]) == (True, 0.25)
    assert {body["model"] for body in talker.asked} == {"first/sft"}


def test_those_who_leave_are_gone_for_the_server_too(talker, running):
    mix = Mix(prompt=(30, 60), output=(60, 90), leave=0.5)
    talker.pause = 0.002
    with running(talker.app) as served:
        found = go(served.url, mix=mix)
    leavers = [ask for ask in plan(LOAD, mix) if ask.leave is not None]
    assert 0 < len(leavers) < 12
    assert sum(o.left for o in found.outcomes) == talker.left == len(leavers)
    assert sorted(o.tokens for o in found.outcomes if o.left) == sorted(ask.leave for ask in leavers)
    assert (talker.running, found.summary()["requests"]["complete"]) == (0, 12 - len(leavers))


def test_sending_ends_when_its_time_is_over(talker, running):
    with running(talker.app) as served:
        found = go(served.url, Load(rate=None, requests=10**5, clients=2, seconds=0.3))
    assert found.unsent == 10**5 - len(found.outcomes) > 0
    assert all(o.complete for o in found.outcomes) and found.outcomes


def test_errors_are_counted_by_their_kind(talker, running):
    talker.turns = ["refuse", "break", "garbage", "fail", "hang", "silent", "refuse"]
    with running(talker.app) as served:
        found = go(served.url, Load(rate=None, requests=8, clients=1, timeout=0.5))
    assert [o.error for o in found.outcomes] == [
        "HTTP 400", "broken stream", "broken stream", "error event internal_error", "timeout", "", "HTTP 400", ""
    ]  # fmt: skip
    figures = found.summary()
    assert figures["requests"] == {"complete": 2, "left": 0, "failed": 6, "unsent": 0}
    assert figures["errors"]["HTTP 400"] == {"count": 2, "first": "this is refused"}
    assert figures["errors"]["error event internal_error"]["first"] == "it went wrong"
    assert figures["errors"]["timeout"] == {"count": 1, "first": "ReadTimeout"}
    assert figures["errors"]["broken stream"] == {"count": 2, "first": "it ended before [DONE]"}
    assert found.outcomes[2].message.startswith("JSONDecodeError")
    silent = found.outcomes[5]
    assert (silent.first, silent.tokens, silent.complete) == (None, 0, True)


def test_a_server_that_goes_away_meanwhile(talker, running):
    load, over = Load(rate=None, requests=30, clients=1), []

    def stop(record):
        if not over:
            over.append(record)
            served.server.should_exit = True
            served.server.force_exit = True

    talker.pause = 0.001
    with running(talker.app) as served:
        found = go(served.url, load, progress=stop)
    kinds = {o.error for o in found.outcomes}
    assert "no connection" in kinds
    assert kinds <= {"", "no connection", "broken stream"}
    assert found.outcomes[0].complete and len(found.outcomes) == 30


@pytest.mark.parametrize(
    ("models", "chat", "message"),
    [
        ({"data": []}, {}, r"/v1/models names no model: give one with --model"),
        ({"data": [{"id": "m"}]}, {"choices": []}, r"/v1/chat/completions tells no usage: prompts cannot be made to measure"),
        ({"data": [{"id": "m"}]}, {"usage": {"prompt_tokens": 7}}, "counts 7 and 7 tokens in 4 and 60 words: it cannot"),
    ],
)
def test_a_server_that_cannot_be_measured(running, models, chat, message):
    app = FastAPI()
    app.get("/v1/models")(lambda: models)
    app.post("/v1/chat/completions")(lambda: chat)
    with running(app) as served, pytest.raises(LoadError, match=message):
        go(served.url)


def test_what_does_not_answer_as_it_should(talker, running):
    with running(talker.app) as served, pytest.raises(LoadError, match=r"/nothing/models answers 404: "):
        go(f"{served.url}/nothing")
    with pytest.raises(
        LoadError, match=r"/v1/models does not answer \(ConnectError: .*\): check the address, or start the server"
    ):
        go(served.url)


def test_an_answer_that_is_no_json(running):
    app = FastAPI()
    app.get("/v1/models")(lambda: HTMLResponse("<h1>Hello</h1>"))
    with running(app) as served, pytest.raises(LoadError, match="does not answer in JSON: is it an OpenAI-compatible server"):
        go(served.url)


def test_a_key(running):
    talker = Talker(key="open sesame")
    with running(talker.app) as served:
        with pytest.raises(LoadError, match="answers 401: the key is missing or wrong; the key is taken from OPENAI_API_KEY"):
            go(served.url)
        assert all(o.complete for o in go(served.url, key="open sesame").outcomes)


def test_addresses():
    assert base_of("http://localhost:8000") == base_of("http://localhost:8000/") == "http://localhost:8000/v1"
    assert base_of("https://example.com/openai/v1/") == "https://example.com/openai/v1"
    for url in ("localhost:8000", "ftp://x/v1", "http://"):
        with pytest.raises(ConfigError, match=r"must be an HTTP address: give one such as http://127\.0\.0\.1:8000/v1"):
            base_of(url)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx_sse", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'athanor-lm\[bench\]'"):
        go("http://localhost")


def test_options_are_checked_first():
    for load, mix in ((replace(LOAD, clients=0), MIX), (LOAD, replace(MIX, leave=2.0))):
        with pytest.raises(ConfigError):
            go("http://localhost", load, mix)


def test_our_own_server_under_load(running, lm):
    """Its context is too short for a first probe of 90 words, which are several tokens each here."""
    engine = lm.engine()
    mix = Mix(prompt=(20, 90), output=(3, 20), leave=0.3)
    with running(create_app(engine, lm.tokenizer, "tiny")) as served:
        found = go(served.url, replace(LOAD, requests=20), mix)
    assert {o.error for o in found.outcomes} == {""}
    asked = sorted(ask.prompt for ask in plan(replace(LOAD, requests=20), mix) if ask.leave is None)
    counted = sorted(o.prompt_tokens for o in found.outcomes if not o.left)
    if len(asked) == len(counted):  # nobody's answer was over before he could leave
        assert all(abs(a - b) <= 20 for a, b in zip(asked, counted, strict=True))
    assert found.summary()["tokens"]["output"] > 0
    assert not engine.has_work


def test_a_context_too_short_for_any_probe(running, fake, tokenizer):
    with (
        running(create_app(fake(max_len=12), tokenizer, "tiny")) as served,
        pytest.raises(LoadError, match="answers 400") as error,
    ):
        go(served.url)
    assert error.value.status == 400


def test_the_figures_are_json(talker, running):
    with running(talker.app) as served:
        json.dumps(go(served.url).summary(), allow_nan=False)
